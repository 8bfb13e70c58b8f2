"""Round-to-nearest quantization with groups, a backend of quantmill."""

__version__ = "0.1.0"
