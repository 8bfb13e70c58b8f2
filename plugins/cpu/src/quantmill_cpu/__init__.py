"""Native CPU kernels for quantmill."""

__version__ = "0.1.0"
