"""Registrations of the GPTQ backend. Imports nothing heavy."""

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
            name="gptq",
            summary="GPTQ: calibrated affine groups of 2 to 8 bits, act-order",
            config="quantmill_gptq.config:GptqConfig",
            quantizer="quantmill_gptq.quantizer:GptqQuantizer",
            codec="quantmill_gptq.codec:GptqCodec",
            linear="quantmill_gptq.linear:QuantLinearFactory",
            calibrator="quantmill_gptq.calibrator:GptqCalibrator",
            quant_methods=("gptq",),
            capabilities=Capabilities(
                calibrated=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear", "conv1d"),
                bits=(2, 3, 4, 5, 6, 7, 8),
            ),
            presets=(
                Preset("gptq-8", {"bits": 8, "group_size": 128}, "8 bits, groups of 128", 8.1),
                Preset("gptq-6", {"bits": 6, "group_size": 128}, "6 bits, groups of 128", 6.17),
                Preset("gptq-5", {"bits": 5, "group_size": 128}, "5 bits, groups of 128", 5.16),
                Preset("gptq-4", {"bits": 4, "group_size": 128}, "4 bits, groups of 128", 4.16),
                Preset("gptq-3", {"bits": 3, "group_size": 128}, "3 bits, groups of 128", 3.15),
                Preset(
                    "gptq-2",
                    {"bits": 2, "group_size": 64, "sym": False},
                    "2 bits, groups of 64",
                    2.28,
                ),
            ),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="gptq",
            quant_methods=("gptq",),
            method="gptq",
            marker_keys=("desc_act", "damp_percent"),
            rules="quantmill_gptq.config:rules",
            accepts="quantmill_gptq.config:is_gptq",
            detect="quantmill_gptq.validate:detect",
            signs=("quantize_config.json",),
        ),
        ConfigReader(
            name="auto-round-gptq",
            quant_methods=("auto-round",),
            method="gptq",
            accepts="quantmill_gptq.autoround:is_packed_so",
            translate="quantmill_gptq.autoround:translate",
        ),
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [CodecRegistration("gptq", "affine", "quantmill_gptq.codec:GptqCodec", "gptq")]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("gptq", "quantmill_gptq.validate:check", methods=("gptq",))]
