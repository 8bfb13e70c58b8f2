"""FP8 for quantmill: 8-bit floats with scales per block, per row or per tensor."""

__version__ = "0.1.0"
