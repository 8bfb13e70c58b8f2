"""The conformance suite for backends, shipped so that strangers' methods are held to our tests.

Subclass :class:`MethodConformance` in a test file of your plugin, name your method, run pytest::

    from quantmill.testing import MethodConformance

    class TestMyMethod(MethodConformance):
        method = "my-method-4"
"""

import pytest

_PARTS = (
    *("base", "registration", "configuration", "forms", "linears", "checkpoints"),
    *("plain", "models"),
)
# So that a failing promise shows the values it compared, in other people's packages too.
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _PARTS))

from quantmill.testing.base import MatrixSource, make_target  # noqa: E402
from quantmill.testing.conformance import MethodConformance  # noqa: E402
from quantmill.testing.fabricate import write_tiny_gpt2, write_tiny_llama  # noqa: E402

__all__ = [
    "MatrixSource",
    "MethodConformance",
    "make_target",
    "write_tiny_gpt2",
    "write_tiny_llama",
]
