"""Quanto's weight formats for quantmill."""

__version__ = "0.1.0"
