"""CUDA kernels for quantmill, written in Triton."""

__version__ = "0.1.0"
