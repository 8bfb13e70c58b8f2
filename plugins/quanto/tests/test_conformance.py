"""Quanto keeps the promises that every backend makes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from quantmill.testing import MethodConformance

SHAPES = (
    *((64, 128), (7, 65), (33, 96), (1, 3), (1, 64), (5, 1), (1, 1)),
    *((3, 256), (5, 160), (2, 130), (1, 192)),
)
"""The last rows are cut into groups of 128, 32, none and 96."""

TOKENS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


class TestInt8(MethodConformance):
    method = "quanto-int8"
    bad_field = "weightss"
    max_error = 0.012
    shapes = SHAPES


class TestFloat8(MethodConformance):
    method = "quanto-float8"
    bad_field = "activation"
    max_error = 0.04
    shapes = SHAPES


class TestInt4(MethodConformance):
    method = "quanto-int4"
    bad_field = "weigths"
    max_error = 0.13
    shapes = SHAPES


class TestInt2(MethodConformance):
    method = "quanto-int2"
    bad_field = "modules_to_convert"
    max_error = 0.6
    shapes = SHAPES


class TestActivations(MethodConformance):
    method = "quanto-activations:weights=int8,activations=int8"
    bad_field = "activation"
    options: ClassVar[dict[str, Any]] = {"calibration": TOKENS}
    max_error = 0.012
    max_linear_error = 0.08
    shapes = SHAPES
