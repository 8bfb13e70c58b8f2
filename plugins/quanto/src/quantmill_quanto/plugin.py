"""Registrations of the Quanto backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Method,
    Preset,
    Validator,
    resolve,
)

if TYPE_CHECKING:
    from quantmill.job import Job

QUANTMILL_API = 1
_METHODS = ("quanto", "quanto-activations")


def _preset(weights: str, summary: str, bits: float) -> Preset:
    return Preset(f"quanto-{weights}", {"weights": weights}, summary, bits)


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="quanto",
            summary="Quanto: int8 and float8 rows, int4 and int2 groups, without calibration",
            config="quantmill_quanto.config:QuantoConfig",
            quantizer="quantmill_quanto.quantizer:QuantoQuantizer",
            codec="quantmill_quanto.codec:QuantoCodec",
            linear="quantmill_quanto.linear:QLinearFactory",
            quant_methods=("quanto",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(2, 4, 8),
            ),
            presets=(
                _preset("int8", "8 bits, a scale per row", 8.01),
                _preset("float8", "8-bit floats (e4m3), a scale per row", 8.01),
                _preset("int4", "4 bits, groups of 128", 4.25),
                _preset("int2", "2 bits, groups of 128", 2.25),
            ),
        ),
        Method(
            name="quanto-activations",
            summary="Quanto with 8-bit activations, whose scales come from calibration",
            config="quantmill_quanto.config:QuantoConfig",
            quantizer="quantmill_quanto.quantizer:QuantoQuantizer",
            codec="quantmill_quanto.codec:QuantoCodec",
            linear="quantmill_quanto.linear:QLinearFactory",
            calibrator="quantmill_quanto.calibrator:QuantoCalibrator",
            quant_methods=("quanto",),
            capabilities=Capabilities(
                calibrated=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(2, 4, 8),
            ),
            presets=tuple(
                Preset(
                    f"quanto-{weights}-a8",
                    {"weights": weights, "activations": "int8"},
                    f"{weights} weights, int8 activations",
                    bits,
                )
                for weights, bits in (("int8", 8.0), ("int4", 4.2))
            ),
        ),
        Method(
            name="bitnet",
            summary="BitNet b1.58 checkpoints: ternary weights, int8 activations, read",
            config="quantmill_quanto.bitnet:BitnetConfig",
            quantizer="quantmill_quanto.bitnet:BitnetQuantizer",
            codec="quantmill_quanto.bitnet:BitnetCodec",
            linear="quantmill_quanto.bitnet:BitLinearFactory",
            quant_methods=("bitnet",),
            capabilities=Capabilities(
                prequantized=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(1.58,),
            ),
        ),
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="quanto",
            quant_methods=("quanto",),
            method="quanto",
            rules="quantmill_quanto.config:rules",
            accepts="quantmill_quanto.config:is_plain",
            # The package's own files have a map in place of a quantization_config.
            detect="quantmill_quanto.qmap:detect",
            signs=("quanto_qmap.json",),
        ),
        ConfigReader(
            name="quanto-activations",
            quant_methods=("quanto",),
            method="quanto-activations",
            rules="quantmill_quanto.config:rules",
            accepts="quantmill_quanto.config:is_active",
        ),
        ConfigReader(
            name="bitnet",
            quant_methods=("bitnet",),
            method="bitnet",
            rules="quantmill_quanto.bitnet:rules",
        ),
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [CodecRegistration("quanto", "affine", "quantmill_quanto.codec:QuantoCodec", "quanto")]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("quanto", "quantmill_quanto.qmap:check", methods=_METHODS)]


@hookimpl
def quantmill_stage_finished(job: Job, stage: str) -> None:
    # The map names what was quantized, which a config that is asked for extra files can't know.
    if stage == "validate" and any(s.method.name in _METHODS for s in job.selections.values()):
        resolve("quantmill_quanto.qmap:note_targets")(job)
