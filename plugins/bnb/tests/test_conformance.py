"""The bitsandbytes presets pass the suite that every backend passes."""

from quantmill.testing import MethodConformance


class TestNF4(MethodConformance):
    method = "bnb-nf4"


class TestNF4DoubleQuantization(MethodConformance):
    method = "bnb-nf4-dq"


class TestFP4(MethodConformance):
    method = "bnb-fp4"


class TestFP4DoubleQuantization(MethodConformance):
    method = "bnb-fp4-dq"


class TestInt8(MethodConformance):
    method = "bnb-int8"
