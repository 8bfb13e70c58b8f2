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
    from quantmill.backend import WeightSource
    from quantmill.findings import Finding
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.targeting.types import Rule, Target

QUANTMILL_API = 1


_MIXES = {
    "BF16": (16.0, "bfloat16, for a file without loss"),
    "F16": (16.0, "float16"),
    "F32": (32.0, "float32"),
    "Q8_0": (8.5, "8 bits, blocks of 32"),
    "Q6_K": (6.5625, "6 bits"),
    "Q5_K_M": (5.5, "5 bits, 6 where errors cost most"),
    "Q5_K_S": (5.5, "5 bits"),
    "Q5_1": (6.0, "5 bits and a minimum, blocks of 32"),
    "Q5_0": (5.5, "5 bits, blocks of 32"),
    "Q4_K_M": (4.5, "4 bits, 6 where errors cost most"),
    "Q4_K_S": (4.5, "4 bits"),
    "Q4_1": (5.0, "4 bits and a minimum, blocks of 32"),
    "Q4_0": (4.5, "4 bits, blocks of 32"),
    "IQ4_NL": (4.5, "4 bits of an uneven grid, blocks of 32"),
    "IQ4_XS": (4.25, "4 bits of an uneven grid"),
    "Q3_K_L": (3.4375, "3 bits, 5 where errors cost most"),
    "Q3_K_M": (3.4375, "3 bits, 4 and 5 where errors cost most"),
    "Q3_K_S": (3.4375, "3 bits"),
    "Q2_K": (2.625, "2 bits, 3 and 4 where errors cost most"),
    "Q2_K_S": (2.625, "2 bits"),
    "MXFP4_MOE": (4.25, "4-bit floats for experts, 8 bits for the rest"),
    "TQ1_0": (1.6875, "ternary, packed tightest: for models trained so"),
    "TQ2_0": (2.0625, "ternary: for models trained so"),
    "Q2_0": (2.25, "2 bits, blocks of 64: for models trained so"),
    "Q1_0": (1.125, "signs, blocks of 128: for models trained so"),
}
"""Nominal bits and a summary of the mixes of llama.cpp that can be written."""


_READ_ONLY = {
    f"gguf-{name}": (
        f"files of {name.upper()} are read, and not written: llama.cpp makes them by a search over"
        " a lattice",
        f"take {instead}",
    )
    for names, instead in (
        (("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"), "gguf-q2_k"),
        (("iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"), "gguf-q3_k_s"),
    )
    for name in names
}


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="gguf",
            summary="GGUF: the block types and mixes of llama.cpp, read packed and written",
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
                bits=(2, 3, 4, 5, 6, 8, 16, 32),
            ),
            presets=tuple(
                Preset(f"gguf-{name.lower()}", {"mix": name}, summary, bits)
                for name, (bits, summary) in _MIXES.items()
            ),
            refused=_READ_ONLY,
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
            tokenizer="quantmill_gguf.tokenizer:load_tokenizer",
            write="quantmill_gguf.export:GgufExport",
            methods=("gguf",),
            importance="quantmill_gguf.importance:write",
            importance_suffixes=(".gguf", ".dat"),
        )
    ]


@hookimpl
def quantmill_target(job: Job) -> Iterable[Rule]:
    rules: Iterable[Rule] = ()
    if any(item.method.name == "gguf" for item in job.selections.values()):
        rules = resolve("quantmill_gguf.planning:rules")(job)
    return rules


def _weighs(job: Job) -> bool:
    """Whether the job has an importance matrix."""
    chosen = [item.config for item in job.selections.values() if item.method.name == "gguf"]
    return any(getattr(config, "imatrix", None) is not None for config in chosen)


@hookimpl
def quantmill_validate(job: Job) -> Iterable[Finding]:
    found: Iterable[Finding] = ()
    if any(item.method.name == "gguf" for item in job.selections.values()):
        found = resolve("quantmill_gguf.importance:findings")(job)
    return found


@hookimpl
def quantmill_quantize(
    job: Job, selection: Selection, target: Target, weight: WeightSource
) -> Form | None:
    if selection.method.name != "gguf" or not _weighs(job):
        return None
    form: Form | None = resolve("quantmill_gguf.importance:quantize")(
        job, selection, target, weight
    )
    return form
