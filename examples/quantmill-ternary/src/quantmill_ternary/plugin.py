"""What this package registers: data, and import strings for all that is code."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import Capabilities, ConfigReader, Method, Preset

QUANTMILL_API = 1


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    """The method and its short names."""
    return [
        Method(
            name="ternary",
            summary="Ternary weights of 1.6 bits, with a scale for each group",
            config="quantmill_ternary.config:TernaryConfig",
            quantizer="quantmill_ternary.quantizer:TernaryQuantizer",
            codec="quantmill_ternary.codec:TernaryCodec",
            quant_methods=("ternary",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear", "conv1d"),
                bits=(1.6,),
            ),
            presets=(
                Preset("ternary-64", {"group_size": 64}, "trits, groups of 64", 1.6),
                Preset("ternary-32", {"group_size": 32}, "trits, groups of 32", 1.6),
            ),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    """How checkpoints of this method are recognised."""
    return [
        ConfigReader(
            name="ternary",
            quant_methods=("ternary",),
            method="ternary",
            rules="quantmill_ternary.config:skip_rules",
        )
    ]
