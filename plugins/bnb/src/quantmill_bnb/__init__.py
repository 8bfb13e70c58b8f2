"""bitsandbytes formats for quantmill: NF4, FP4, double quantization, LLM.int8."""

__version__ = "0.1.0"
