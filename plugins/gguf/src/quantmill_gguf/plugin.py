"""Registrations of the GGUF backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Container,
    Method,
    Preset,
    resolve,
)

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill.targeting.types import Rule

QUANTMILL_API = 1


def _preset(name: str, bits: float, summary: str) -> Preset:
    return Preset(f"gguf-{name.lower()}", {"type": name}, summary, bits)


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="gguf",
            summary="GGUF: the block types of llama.cpp, read packed; plain types quantized",
            config="quantmill_gguf.config:GgufConfig",
            quantizer="quantmill_gguf.quantizer:GgufQuantizer",
            codec="quantmill_gguf.codec:GgufCodec",
            quant_methods=("gguf",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                trainable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear", "conv1d", "embedding"),
                bits=(2, 4, 5, 8),
            ),
            presets=(
                _preset("Q8_0", 8.5, "8 bits, blocks of 32"),
                _preset("Q5_1", 6.0, "5 bits and a minimum, blocks of 32"),
                _preset("Q5_0", 5.5, "5 bits, blocks of 32"),
                _preset("Q4_1", 5.0, "4 bits and a minimum, blocks of 32"),
                _preset("Q4_0", 4.5, "4 bits, blocks of 32"),
            ),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="gguf",
            quant_methods=("gguf",),
            method="gguf",
            rules="quantmill_gguf.config:rules",
        )
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [CodecRegistration("gguf", "affine", "quantmill_gguf.codec:GgufCodec", "gguf")]


@hookimpl
def quantmill_containers() -> Sequence[Container]:
    return [
        Container(
            "gguf",
            (".gguf",),
            "quantmill_gguf.reader:read",
            write="quantmill_gguf.export:GgufExport",
            methods=("gguf",),
        )
    ]


@hookimpl
def quantmill_target(job: Job) -> Iterable[Rule]:
    rules: Iterable[Rule] = resolve("quantmill_gguf.planning:rules")(job)
    return rules
