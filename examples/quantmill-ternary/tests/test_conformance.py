"""Every short name passes the suite that every backend of quantmill passes."""

from pathlib import Path

from quantmill.testing import MethodConformance


class TestTernary64(MethodConformance):
    method = "ternary-64"
    max_error = 0.5
    golden = Path(__file__).with_name("golden.safetensors")


class TestTernary32(MethodConformance):
    method = "ternary-32"
    max_error = 0.5


class TestOddGroups(MethodConformance):
    method = "ternary:group_size=24,threshold=0.5"
    max_error = 0.55
