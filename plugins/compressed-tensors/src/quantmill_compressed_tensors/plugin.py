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
            ),
        )
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
        )
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [
        CodecRegistration("compressed-tensors", kind, _CODEC, "compressed-tensors")
        for kind in ("affine", "scaled_float")
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
