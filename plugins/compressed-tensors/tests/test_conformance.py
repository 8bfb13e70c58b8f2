"""compressed-tensors keeps the promises that every backend makes."""

from __future__ import annotations

from quantmill.testing import MethodConformance


class TestFourBits(MethodConformance):
    method = "ct-int4:group_size=32"
    bad_field = "group_sise"
    shapes = ((64, 128), (7, 64), (33, 96), (1, 32), (5, 1), (7, 65))


class TestFourBitsAsymmetric(MethodConformance):
    method = "ct-int4-asym:group_size=32"
    bad_field = "symetric"
    shapes = ((64, 128), (7, 64), (33, 96), (1, 32))


class TestThreeBitsPerRow(MethodConformance):
    method = "ct:num_bits=3,strategy=channel,symmetric=false"
    bad_field = "strateg"
    max_error = 0.4


class TestFloat8Blocks(MethodConformance):
    method = "ct-fp8:strategy=block,block_structure=[32,48]"
    bad_field = "block_struct"
    max_error = 0.05


class TestEightBitsDynamic(MethodConformance):
    method = "ct-int8-dynamic"
    bad_field = "dynamic_activation"
    max_error = 0.02
    max_linear_error = 0.05


class TestFloat8Dynamic(MethodConformance):
    method = "ct-fp8-dynamic"
    bad_field = "dynamic_activation"
    max_error = 0.05
    max_linear_error = 0.05


class TestNaiveBytes(MethodConformance):
    method = "ct:num_bits=8,strategy=tensor,symmetric=false,format=naive-quantized"
    bad_field = "formt"
    max_error = 0.03


FP4 = ((64, 128), (7, 64), (33, 96), (1, 32))


class TestFourBitFloats(MethodConformance):
    method = "ct-nvfp4"
    bad_field = "num_bit"
    shapes = FP4


class TestFourBitFloatsOfPowersOfTwo(MethodConformance):
    method = "ct-mxfp4"
    bad_field = "scale_dtyp"
    shapes = FP4


class TestEightBitFloatsOfPowersOfTwo(MethodConformance):
    method = "ct-mxfp8"
    bad_field = "scale_dtyp"
    max_error = 0.05
    shapes = FP4
