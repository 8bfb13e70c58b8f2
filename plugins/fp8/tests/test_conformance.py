"""FP8 keeps the promises that every backend makes."""

from __future__ import annotations

from quantmill.testing import MethodConformance


class TestBlocks(MethodConformance):
    method = "fp8-block"
    bad_field = "weight_block_sise"
    max_error = 0.03


class TestSmallBlocksOfPowersOfTwo(MethodConformance):
    method = "fp8-block-ue8m0:weight_block_size=[16,48]"
    bad_field = "scale_format"
    max_error = 0.04


class TestMicroscaling(MethodConformance):
    method = "fp8-mx"
    bad_field = "activation_shceme"
    max_error = 0.04


class TestPerTensor(MethodConformance):
    method = "fp8-tensor"
    bad_field = "block_size"
    max_error = 0.03


class TestRows(MethodConformance):
    method = "fp8-row"
    bad_field = "activation_scale_up"
    max_error = 0.03
