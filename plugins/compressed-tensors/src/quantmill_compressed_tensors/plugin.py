"""Registrations of the compressed-tensors backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Method,
    Preset,
    Validator,
)

QUANTMILL_API = 1

_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 128}
_INT8 = {"num_bits": 8, "strategy": "channel"}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_MXFP8 = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_MXFP4 = {**_MXFP8, "num_bits": 4}
_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_CODEC = "quantmill_compressed_tensors.codec:CompressedCodec"


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="compressed-tensors",
            summary="compressed-tensors: packed integers, int8 and FP8, as vLLM serves them",
            config="quantmill_compressed_tensors.config:CompressedConfig",
            quantizer="quantmill_compressed_tensors.quantizer:CompressedQuantizer",
            codec=_CODEC,
            linear="quantmill_compressed_tensors.linear:CompressedLinearFactory",
            quant_methods=("compressed-tensors",),
            aliases=("ct",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(2, 3, 4, 5, 6, 7, 8),
            ),
            presets=(
                Preset("ct-int8", _INT8, "8 bits, one scale per row", 8.01),
                Preset(
                    "ct-int8-dynamic",
                    {**_INT8, "dynamic_activations": True},
                    "8 bits, activations int8 per token",
                    8.0,
                ),
                Preset("ct-fp8", _FP8, "FP8 (e4m3), one scale per row", 7.99),
                Preset(
                    "ct-fp8-dynamic",
                    {**_FP8, "dynamic_activations": True},
                    "FP8 (e4m3), activations FP8 per token",
                    7.98,
                ),
                Preset(
                    "ct-int4-asym",
                    {**_INT4, "symmetric": False},
                    "4 bits, groups of 128, zero points",
                    4.16,
                ),
                Preset("ct-int4", _INT4, "4 bits, groups of 128, symmetric", 4.125),
                Preset("ct-mxfp8", _MXFP8, "FP8 (e4m3), 32 share a power of two", 7.97),
                Preset("ct-nvfp4", _NVFP4, "4-bit floats, 16 share an e4m3 scale", 4.12),
                Preset("ct-mxfp4", _MXFP4, "4-bit floats, 32 share a power of two", 4.0),
            ),
        ),
        *(
            Method(
                name=name,
                summary=f"{name} checkpoints of {writer}: 4-bit floats, read",
                config=f"quantmill_compressed_tensors.native:{title}Config",
                quantizer=f"quantmill_compressed_tensors.native:Native{title}Quantizer",
                codec=f"quantmill_compressed_tensors.native:{title}Codec",
                linear="quantmill_compressed_tensors.native:Fp4LinearFactory",
                quant_methods=(name,),
                capabilities=Capabilities(
                    prequantized=True,
                    trainable=True,
                    compileable=True,
                    dequantizable=True,
                    devices=("cpu", "cuda"),
                    target_kinds=("linear",),
                    bits=(4,),
                ),
            )
            for name, title, writer in (
                ("mxfp4", "Mxfp4", "transformers"),
                ("nvfp4", "Nvfp4", "ModelOpt"),
            )
        ),
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="compressed-tensors",
            quant_methods=("compressed-tensors",),
            method="compressed-tensors",
            marker_keys=("config_groups",),
            rules="quantmill_compressed_tensors.config:rules",
        ),
        ConfigReader(
            name="mxfp4",
            quant_methods=("mxfp4",),
            method="mxfp4",
            rules="quantmill_compressed_tensors.native:rules",
        ),
        ConfigReader(
            name="nvfp4",
            quant_methods=("nvfp4", "modelopt"),
            method="nvfp4",
            rules="quantmill_compressed_tensors.native:rules",
            accepts="quantmill_compressed_tensors.native:is_nvfp4",
        ),
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [
        CodecRegistration("compressed-tensors", kind, _CODEC, "compressed-tensors")
        for kind in ("affine", "scaled_float", "codebook")
    ]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [
        Validator(
            "compressed-tensors",
            "quantmill_compressed_tensors.validate:check",
            methods=("compressed-tensors",),
        )
    ]
