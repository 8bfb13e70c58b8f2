"""AWQ keeps the promises that every backend makes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from quantmill.testing import MethodConformance

TOKENS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


class TestAsymmetric(MethodConformance):
    method = "awq-4:group_size=32"
    bad_field = "zero_pont"
    shapes = ((64, 128), (8, 64), (32, 96))
    changes_float = True
    options: ClassVar[dict[str, Any]] = {"calibration": TOKENS}


class TestSymmetric(MethodConformance):
    method = "awq-4-sym:group_size=64"
    bad_field = "group_sise"
    shapes = ((64, 128), (8, 64))
    changes_float = True
    options: ClassVar[dict[str, Any]] = {"calibration": TOKENS}
