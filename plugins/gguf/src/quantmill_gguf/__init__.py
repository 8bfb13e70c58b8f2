"""GGUF for quantmill: files of llama.cpp, read packed, and its block types."""

__version__ = "0.1.0"
