"""Registrations of the AWQ backend. Imports nothing heavy."""

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


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="awq",
            summary="AWQ: 4-bit groups, scaled by activations before rounding",
            config="quantmill_awq.config:AwqConfig",
            quantizer="quantmill_awq.quantizer:AwqQuantizer",
            codec="quantmill_awq.codec:AwqCodec",
            linear="quantmill_awq.linear:WQLinearFactory",
            calibrator="quantmill_awq.calibrator:AwqCalibrator",
            quant_methods=("awq",),
            capabilities=Capabilities(
                calibrated=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(4,),
            ),
            presets=(
                Preset("awq-4", {"bits": 4, "group_size": 128}, "4 bits, groups of 128", 4.15),
                Preset(
                    "awq-4-sym",
                    {"bits": 4, "group_size": 128, "zero_point": False},
                    "4 bits, groups of 128, symmetric",
                    4.15,
                ),
            ),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="awq",
            quant_methods=("awq",),
            method="awq",
            marker_keys=("zero_point", "w_bit"),
            rules="quantmill_awq.config:rules",
            detect="quantmill_awq.validate:detect",
            signs=("quantize_config.json", "quant_config.json"),
        ),
        ConfigReader(
            name="auto-round-awq",
            quant_methods=("auto-round",),
            method="awq",
            accepts="quantmill_awq.autoround:is_packed_so",
            translate="quantmill_awq.autoround:translate",
        ),
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [CodecRegistration("awq", "affine", "quantmill_awq.codec:AwqCodec", "awq")]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("awq", "quantmill_awq.validate:check", methods=("awq",))]
