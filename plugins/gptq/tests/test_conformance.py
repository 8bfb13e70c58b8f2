"""GPTQ keeps the promises that every backend makes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from quantmill.testing import MethodConformance

TOKENS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


class TestFourBits(MethodConformance):
    method = "gptq-4:group_size=32"
    bad_field = "group_sise"
    shapes = ((64, 128), (8, 64), (32, 96), (16, 40))
    options: ClassVar[dict[str, Any]] = {"calibration": TOKENS}


class TestThreeBitsActOrder(MethodConformance):
    method = "gptq-3:group_size=32,desc_act=true,sym=false"
    bad_field = "des_act"
    max_error = 0.3
    shapes = ((64, 128), (32, 64), (32, 96))
    options: ClassVar[dict[str, Any]] = {"calibration": TOKENS}


class TestEightBitsPerRow(MethodConformance):
    method = "gptq-8:group_size=-1"
    bad_field = "bitss"
    shapes = ((64, 128), (8, 64), (32, 96))
    options: ClassVar[dict[str, Any]] = {"calibration": TOKENS}
