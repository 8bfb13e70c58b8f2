"""The ``quant_method`` keys of transformers, and what to do with those that no plugin reads.

Data only: it is registered as dialects that are refused, and the documentation makes a table of it.
"""

from __future__ import annotations

from typing import Final

__all__ = ["KEYS", "REFUSED", "SAME"]

KEYS: Final = (
    "aqlm",
    "auto-round",
    "awq",
    "bitnet",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "compressed-tensors",
    "eetq",
    "fbgemm_fp8",
    "fouroversix",
    "fp8",
    "fp_quant",
    "gemma",
    "gguf",
    "gptq",
    "higgs",
    "hqq",
    "metal",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "quanto",
    "quark",
    "sinq",
    "spqr",
    "torchao",
    "vptq",
)
"""All keys of transformers 5.23."""

SAME: Final = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Keys that a checkpoint spells otherwise."""

REFUSED: Final = {
    "aqlm": (
        "its weights are sums of vectors from codebooks, for which there is no form here",
        "load it with transformers and aqlm, save it dequantized, and quantize that",
    ),
    "eetq": (
        "its int8 codes lie in an order that depends on the GPU",
        "quantize the float checkpoint: bnb-int8, torchao-int8wo or ct-int8 hold the same",
    ),
    "fouroversix": (
        "it quantizes while loading, to 4-bit floats with scales chosen per block",
        "give the float checkpoint, with ct-nvfp4",
    ),
    "fp_quant": (
        "its weights are rotated, and inputs would have to be rotated with them",
        "quantize the float checkpoint with ct-nvfp4 or ct-mxfp4",
    ),
    "gemma": (
        "its linears have stored scales of inputs and outputs, of a kind of its own",
        "load it with transformers, save it dequantized, and quantize that",
    ),
    "higgs": (
        "its weights are rotated vectors of a grid, packed for one GPU kernel",
        "load it with transformers, call dequantize() there, and quantize the result",
    ),
    "metal": (
        "its words are packed for kernels of Apple's GPUs",
        "quantize the float checkpoint: hqq-4 or ct-int4-asym are of the same kind",
    ),
    "quark": (
        "AMD Quark's own export is read by its library only",
        "export it as GGUF, or quantize the float checkpoint with ct-fp8 or ct-int4",
    ),
    "sinq": (
        "its weights have scales along both axes, for which there is no form here",
        "quantize the float checkpoint: hqq-4 needs no calibration either",
    ),
    "spqr": (
        "its outliers are a sparse matrix beside the codes",
        "quantize the float checkpoint: gptq-3 has as many bits",
    ),
    "vptq": (
        "its weights are vectors from codebooks, for which there is no form here",
        "load it with transformers and vptq, save it dequantized, and quantize that",
    ),
}
"""Key to why it is not read, and what to do."""
