"""Registrations of the torchao backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Method,
    Preset,
    Requirement,
    Validator,
)

QUANTMILL_API = 1

_CODEC = "quantmill_torchao.codec:TorchaoCodec"


def _preset(name: str, kind: str, summary: str, bits: float, **fields: Any) -> Preset:
    return Preset(f"torchao-{name}", {"quant_type": kind, **fields}, summary, bits)


@hookimpl
def quantmill_requirements() -> Sequence[Requirement]:
    return [
        Requirement(
            "torchao",
            ">=0.17,<0.19",
            "The files and tensors of torchao change with its versions.",
        )
    ]


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="torchao",
            summary="torchao: int4, int8, intx and float8 weights, with 8-bit activations or not",
            config="quantmill_torchao.config:TorchaoConfig",
            quantizer="quantmill_torchao.quantizer:TorchaoQuantizer",
            codec=_CODEC,
            linear="quantmill_torchao.linear:TorchaoLinearFactory",
            quant_methods=("torchao",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(1, 2, 3, 4, 5, 6, 7, 8),
            ),
            presets=(
                _preset("int8wo", "Int8WeightOnlyConfig", "int8, a scale per row", 8.02),
                _preset(
                    "int8da-int8w",
                    "Int8DynamicActivationInt8WeightConfig",
                    "int8, activations int8 per token",
                    8.015,
                ),
                _preset("float8wo", "Float8WeightOnlyConfig", "float8 (e4m3), rows", 7.995),
                _preset(
                    "float8da-float8w",
                    "Float8DynamicActivationFloat8WeightConfig",
                    "float8 (e4m3), activations float8 per token",
                    7.985,
                    granularity="PerRow",
                ),
                _preset("int4wo", "Int4WeightOnlyConfig", "int4, groups of 128", 4.255),
                _preset(
                    "intx4wo",
                    "IntxWeightOnlyConfig",
                    "int4 in bytes (on disk), groups of 128",
                    4.13,
                    weight_dtype="int4",
                    granularity="PerGroup(128)",
                ),
                _preset(
                    "int8da-int4w",
                    "Int8DynamicActivationIntxWeightConfig",
                    "int4 in bytes (on disk), groups of 32, activations int8 per token",
                    4.51,
                    weight_dtype="int4",
                    weight_granularity="PerGroup(32)",
                ),
            ),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="torchao",
            quant_methods=("torchao",),
            method="torchao",
            marker_keys=("quant_type",),
            rules="quantmill_torchao.config:rules",
            objects=("torchao",),
            from_object="quantmill_torchao.config:from_object",
        )
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [
        CodecRegistration(f"torchao-{kind}", kind, _CODEC, "torchao")
        for kind in ("affine", "scaled_float")
    ]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("torchao", "quantmill_torchao.validate:check", methods=("torchao",))]
