"""The metadata of a file that is written: general facts, the architecture's keys, the tokenizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import Finding
from quantmill_gguf import codes
from quantmill_gguf.config import GgufConfig
from quantmill_gguf.imatrix import COUNTS
from quantmill_gguf.importance import matrix_of
from quantmill_gguf.mixes import MIXES, mix_named
from quantmill_gguf.reader import GgufSource
from quantmill_gguf.vocab.model import Files, UnknownKind, Vocabulary, VocabularyError
from quantmill_gguf.vocab.write import vocabulary_of

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill_gguf.layout import Layout

__all__ = ["metadata_of", "metadata_problems"]

_QUANTIZATION_VERSION: Final = 2
"""Of ggml's block formats."""


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
    found["general.file_type"] = _file_type(job, layout, types)
    found["general.quantization_version"] = _QUANTIZATION_VERSION
    there = matrix_of(job)
    if there is not None:
        path, matrix = there
        found |= matrix.facts(path)
        kinds |= dict.fromkeys(COUNTS, "uint32")
    if isinstance(job.headers.source, GgufSource):
        # A file's tokenizer goes on as it is.
        first = job.headers.source.files[0]
        kept = {k: v for k, v in first.metadata.items() if k.startswith("tokenizer.")}
        if kept:
            return found | kept, kinds | {key: first.kinds[key] for key in kept}
    else:
        vocabulary = _vocabulary(job, layout)
        if isinstance(vocabulary, Vocabulary):
            return found | vocabulary.metadata(), kinds | vocabulary.kinds
    # Without these two llama.cpp does not load the file.
    found.setdefault(f"{arch}.vocab_size", layout.config["vocab_size"])
    found["tokenizer.ggml.model"] = "none"
    return found, kinds


def metadata_problems(job: Job, layout: Layout) -> Iterable[Finding]:
    """What is wrong with the tokenizer, or missing."""
    if isinstance(job.headers.source, GgufSource):
        return
    found = _vocabulary(job, layout)
    where = job.headers.source.describe()
    without = "the file will have no vocabulary, and llama.cpp will take token ids only, no text"
    if found is None:
        cause = f"it has neither tokenizer.json nor tokenizer.model: {without}"
        yield codes.NO_TOKENIZER(where, cause, "add the tokenizer's files to the folder")
    elif isinstance(found, UnknownKind):
        yield codes.NO_TOKENIZER(where, f"{found.cause}: {without}", found.fix)
    elif isinstance(found, VocabularyError):
        yield codes.BAD_TOKENIZER(where, found.cause, found.fix)
    else:
        for note in found.notes:
            fix = "nothing to do, unless such texts matter: then give llama.cpp token ids"
            yield codes.INEXACT_TOKENIZER(where, note, fix)


def _vocabulary(job: Job, layout: Layout) -> Vocabulary | VocabularyError | None:
    """The tokenizer of the source, read once."""
    state = job.state["gguf"]
    if "vocabulary" not in state:
        source = job.headers.source

        def read(name: str) -> bytes | None:
            there = source.exists(name)
            return source.read(name, 0, source.size(name)) if there else None

        pre = None
        for item in job.selections.values():
            if isinstance(item.config, GgufConfig):
                pre = pre or item.config.pre_tokenizer
        try:
            state["vocabulary"] = vocabulary_of(Files(read), layout.config, pre)
        except VocabularyError as error:
            state["vocabulary"] = error
    found: Vocabulary | VocabularyError | None = state["vocabulary"]
    return found


def _name(job: Job) -> str:
    name = str(job.headers.config.get("_name_or_path") or job.headers.source.describe())
    return Path(name).name or "model"


def _file_type(job: Job, layout: Layout, types: Mapping[str, str]) -> int:
    """llama.cpp shows it and computes nothing with it: of the mix, or else of the type that most
    weights have."""
    for item in job.selections.values():
        config = item.config
        if isinstance(config, GgufConfig) and config.mix is not None and config.type is None:
            return mix_named(config.mix).file_type
    elements: Counter[str] = Counter()
    for name, planned in layout.tensors.items():
        if len(planned.shape) > 1:
            elements[types[name]] += math.prod(planned.shape)
    most = elements.most_common(1)
    by_base = {mix.base: mix.file_type for mix in MIXES.values()}
    return by_base.get(most[0][0], 0) if most else 0
