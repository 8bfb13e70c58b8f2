"""GPTQ for quantmill: calibrated affine quantization with error compensation."""

__version__ = "0.1.0"
