"""HQQ keeps the promises that every backend makes."""

from __future__ import annotations

from quantmill.testing import MethodConformance

SHAPES = ((64, 128), (7, 65), (33, 96), (1, 64), (8, 64), (16, 40), (64, 65), (64, 24))
"""Groups of 64 cross rows in the last ones."""


class TestFourBits(MethodConformance):
    method = "hqq-4"
    bad_field = "group_sise"
    max_error = 0.12
    shapes = SHAPES


class TestEightBits(MethodConformance):
    method = "hqq-8"
    bad_field = "nbitss"
    max_error = 0.012
    shapes = SHAPES


class TestThreeBits(MethodConformance):
    method = "hqq-3"
    bad_field = "axiss"
    max_error = 0.25
    shapes = SHAPES


class TestOneBitOfEveryRow(MethodConformance):
    method = "hqq:nbits=1,group_size=null"
    bad_field = "lp_nrm"
    max_error = 2.0
    """With the full range as its step, one bit is for what outliers leave; what the search makes
    small is no square: the library's weights are as far off."""
    shapes = ((64, 128), (8, 64), (16, 40), (7, 64))


class TestFourBitsOfStridedGroups(MethodConformance):
    method = "hqq-4:axis=0"
    bad_field = "skip_module"
    max_error = 0.12
    shapes = SHAPES


class TestThreeBitsOfStridedGroupsUnsearched(MethodConformance):
    method = "hqq-3:axis=0,group_size=32,optimize=false"
    bad_field = "optimise"
    max_error = 0.25
    shapes = SHAPES
