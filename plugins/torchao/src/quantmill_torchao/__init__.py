"""torchao for quantmill: its configs, its tensors and its files."""

__version__ = "0.1.0"
