"""Which type each weight gets: rules for the targeting of a job that quantizes to ggml's types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from quantmill.targeting.patterns import parse
from quantmill.targeting.types import ModuleInfo, Rule
from quantmill_gguf.config import GgufConfig
from quantmill_gguf.layout import FLOAT32, Layout, Planned, layout_of
from quantmill_gguf.mixes import MixOptions, ModelFacts, mix_named
from quantmill_gguf.tensor_types import choose, fallback
from quantmill_gguf.types.sizes import BY_NAME

if TYPE_CHECKING:
    from quantmill.job import Job

__all__ = ["mixed_types", "pattern_of", "rules"]

_ORIGIN = "plugin:gguf"

_SMALL = 32
"""A width that types of small blocks fit alone."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rules(job: Job) -> Iterable[Rule]:
    """What llama.cpp quantizes, to which types, and what it keeps."""
    mine = [item for item in job.selections.values() if item.method.name == "gguf"]
    if not mine or job.prequantized or job.architecture is None:
        return []
    layout = layout_of(job)
    main = next(iter(job.selections.values()))
    if layout.family is None:
        return list(_unknown(job))
    if isinstance(main.config, GgufConfig) and main.config.type is None:
        return list(_mixed(layout, job, main.config))
    config = main.config if isinstance(main.config, GgufConfig) else GgufConfig()
    return list(_uniform(layout, job, config))


def _matrices(layout: Layout, job: Job) -> Iterator[tuple[ModuleInfo, Planned]]:
    assert job.architecture is not None
    for module in job.architecture.modules:
        weight = module.parameters.get("weight")
        planned = None if weight is None else layout.tensor_of(weight.name)
        if planned is not None and len(planned.shape) > 1:
            yield module, planned


def _unknown(job: Job) -> Iterator[Rule]:
    """A model that llama.cpp does not know: its linears only."""
    assert job.architecture is not None
    kept = [item.name for item in job.architecture.modules if item.kind == "embedding"]
    if kept:
        yield Rule(pattern_of(kept), "skip", _ORIGIN, reason="it is looked up", optional=True)


def _holds(layout: Layout, planned: Planned, type_name: str) -> bool:
    """Whether blocks of a type stay whole where columns lie in another order."""
    block = BY_NAME[type_name].block
    return all(layout.entries[name].move.keeps(block) for name in planned.parameters)


def _uniform(layout: Layout, job: Job, config: GgufConfig) -> Iterator[Rule]:
    """One type for all that is computed with."""
    kept: list[str] = []
    quantized: list[str] = []
    for module, planned in _matrices(layout, job):
        form = config.type_for(planned.shape[-1])
        stays = planned.name.endswith(FLOAT32) or not _holds(layout, planned, form)
        (kept if stays else quantized).append(module.name)
    yield from _split(quantized, kept)


def _split(quantized: Sequence[str], kept: Sequence[str]) -> Iterator[Rule]:
    if quantized:
        why = "llama.cpp quantizes it"
        yield Rule(pattern_of(quantized), "include", _ORIGIN, reason=why, optional=True)
    if kept:
        why = "llama.cpp does not quantize it"
        yield Rule(pattern_of(kept), "skip", _ORIGIN, reason=why, optional=True)


def _mixed(layout: Layout, job: Job, config: GgufConfig) -> Iterator[Rule]:
    """The types of a mix."""
    types = mixed_types(layout, config)
    assert job.architecture is not None
    depth = 1 + max((m.layer for m in job.architecture.modules if m.layer is not None), default=-1)
    own = [parse(pattern) for pattern in job.assigned]
    kept: list[str] = []
    by_type: dict[str, list[str]] = {}
    for module, planned in _matrices(layout, job):
        chosen = types[planned.name]
        if chosen == planned.kept:
            kept.append(module.name)
        elif not any(pattern.matches(module, depth) for pattern in own):
            by_type.setdefault(chosen, []).append(module.name)
    yield from _split([name for names in by_type.values() for name in names], kept)
    for chosen, names in by_type.items():
        yield Rule(pattern_of(names), "configure", _ORIGIN, options={"type": chosen}, optional=True)


def mixed_types(layout: Layout, config: GgufConfig) -> dict[str, str]:
    """The type of every tensor of a layout, as the config's mix has it."""
    assert layout.family is not None
    arch = layout.family.arch
    keys = {f"{arch}.{key}": value for key, value in layout.family.write(layout.config).items()}
    facts = ModelFacts.of({"general.architecture": arch, **keys})
    options = MixOptions(
        importance=config.imatrix is not None,
        output=config.output_type,
        embedding=config.embedding_type,
    )
    tensors = [(item.name, item.shape, item.kept) for item in layout.tensors.values()]
    types = choose(mix_named(config.mix or "Q8_0"), facts, tensors, options)
    for name, planned in layout.tensors.items():
        if types[name] != planned.kept and not _holds(layout, planned, types[name]):
            # As for a width that blocks don't divide.
            other = fallback(types[name], _SMALL)
            types[name] = other if _holds(layout, planned, other) else planned.kept
    return types


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
