"""compressed-tensors for quantmill: the checkpoints that vLLM serves."""

__version__ = "0.1.0"
