"""GGUF's types keep the promises that every backend makes."""

from __future__ import annotations

from quantmill.testing import MethodConformance

SLACK = 5 << 20
"""Without a kernel types differ in what they make of the pieces of a weight."""
SHAPES = ((64, 128), (7, 64), (33, 96), (1, 32), (5, 1))


class TestQ8(MethodConformance):
    method = "gguf-q8_0"
    bad_field = "typo"
    shapes = SHAPES
    working_slack = SLACK


class TestQ4(MethodConformance):
    method = "gguf-q4_0"
    bad_field = "tipe"
    shapes = SHAPES
    working_slack = SLACK


class TestQ5WithMinima(MethodConformance):
    method = "gguf-q5_1"
    bad_field = "bits"
    shapes = SHAPES
    working_slack = SLACK
