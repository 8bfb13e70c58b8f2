"""The conformance suite for backends, shipped so that strangers' methods are held to our tests.

Subclass :class:`MethodConformance` in a test file of your plugin, name your method, run pytest::

    from quantmill.testing import MethodConformance

    class TestMyMethod(MethodConformance):
        method = "my-method-4"
"""

from quantmill.testing.conformance import MethodConformance
from quantmill.testing.fabricate import write_tiny_llama

__all__ = ["MethodConformance", "write_tiny_llama"]
