"""The metadata of a file that is written: general facts, the architecture's keys, the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import Finding
from quantmill_gguf.types.sizes import PLAIN

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill_gguf.layout import Layout

__all__ = ["metadata_of", "metadata_problems"]

_QUANTIZATION_VERSION: Final = 2
"""Of ggml's block formats."""
_FILE_TYPES: Final = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
}
"""``general.file_type`` by the type that most matrices have; llama.cpp shows it, no more."""


def metadata_of(
    job: Job, layout: Layout, types: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str | int]]:
    """Metadata in order, and value types of the keys where the value does not tell."""
    assert layout.family is not None
    arch = layout.family.arch
    found: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": _name(job),
    }
    kinds: dict[str, str | int] = {}
    for key, value in layout.family.write(layout.config).items():
        found[f"{arch}.{key}"] = value
    found["general.file_type"] = _file_type(layout, types)
    found["general.quantization_version"] = _QUANTIZATION_VERSION
    return found, kinds


def metadata_problems(job: Job, layout: Layout) -> Iterable[Finding]:
    """What is wrong with the tokenizer, or missing."""
    return ()


def _name(job: Job) -> str:
    name = str(job.headers.config.get("_name_or_path") or job.headers.source.describe())
    return Path(name).name or "model"


def _file_type(layout: Layout, types: Mapping[str, str]) -> int:
    elements: Counter[str] = Counter()
    for name, planned in layout.tensors.items():
        size = 1
        for extent in planned.shape:
            size *= extent
        if types[name] not in PLAIN or len(planned.shape) > 1:
            elements[types[name]] += size
    most = elements.most_common(1)
    return _FILE_TYPES.get(most[0][0], 0) if most else 0
