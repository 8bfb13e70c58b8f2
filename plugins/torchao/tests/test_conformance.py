"""torchao's layouts keep the promises that every backend makes."""

from __future__ import annotations

from quantmill.testing import MethodConformance


class TestInt8(MethodConformance):
    method = "torchao-int8wo"
    bad_field = "granularty"
    max_error = 0.012


class TestInt4(MethodConformance):
    method = "torchao-int4wo:group_size=32"
    max_error = 0.13


class TestIntxDynamic(MethodConformance):
    method = "torchao-int8da-int4w"
    max_error = 0.15


class TestFloat8Dynamic(MethodConformance):
    method = "torchao-float8da-float8w"
    max_error = 0.04
    max_linear_error = 0.1  # activations are rounded too
    shapes = ((64, 128), (16, 32), (48, 16))
