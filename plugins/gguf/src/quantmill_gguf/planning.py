"""Which type each weight gets: rules for the targeting of a job that quantizes to ggml's types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from quantmill.targeting.types import Rule
from quantmill_gguf.layout import FLOAT32, Layout, layout_of

if TYPE_CHECKING:
    from quantmill.job import Job

__all__ = ["rules"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rules(job: Job) -> Iterable[Rule]:
    """What llama.cpp quantizes, and what it keeps."""
    mine = [item for item in job.selections.values() if item.method.name == "gguf"]
    if not mine or job.prequantized or job.architecture is None:
        return []
    layout = layout_of(job)
    return list(_rules(layout, job))


def _rules(layout: Layout, job: Job) -> Iterator[Rule]:
    assert job.architecture is not None
    origin = "plugin:gguf"
    quantized, kept = [], []
    for module in job.architecture.modules:
        weight = module.parameters.get("weight")
        planned = None if weight is None else layout.tensor_of(weight.name)
        if planned is None:
            if layout.family is None and module.kind == "embedding":
                kept.append(module.name)  # Nobody knows what it is for.
        elif len(planned.shape) > 1 and planned.kept != "F32":
            quantized.append(module.name)
        elif len(planned.shape) > 1 and _is_float32(planned.name):
            kept.append(module.name)
        elif len(planned.shape) > 1:
            quantized.append(module.name)
    if quantized:
        why = "llama.cpp quantizes it"
        yield Rule(pattern_of(quantized), "include", origin, reason=why, optional=True)
    if kept:
        why = "llama.cpp keeps it in float32" if layout.family else "it is looked up, not computed"
        yield Rule(pattern_of(kept), "skip", origin, reason=why, optional=True)


def _is_float32(name: str) -> bool:
    return name.endswith(FLOAT32)


def pattern_of(names: Iterable[str]) -> str:
    """One pattern that matches exactly these names: names that differ in a number share a part."""
    groups: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        numbers = tuple(_NUMBER.findall(name))
        groups.setdefault(_NUMBER.sub("*", name), set()).add(numbers)
    parts = []
    for starred, found in groups.items():
        columns = [sorted({row[i] for row in found}, key=int) for i in range(starred.count("*"))]
        count = 1
        for column in columns:
            count *= len(column)
        if count == len(found):
            # Every combination is there.
            parts.append(_filled(starred, [f"(?:{'|'.join(column)})" for column in columns]))
        else:
            parts.extend(_filled(starred, row) for row in sorted(found))
    return "re:" + "|".join(parts)


def _filled(starred: str, pieces: Sequence[str]) -> str:
    """The name as a regular expression with ``pieces`` in place of its stars."""
    first, *rest = (re.escape(part) for part in starred.split("*"))
    return first + "".join(f"{piece}{part}" for piece, part in zip(pieces, rest, strict=True))
