"""Ternary weights of 1.6 bits, an example of a third-party backend."""

__version__ = "0.1.0"
