"""Which files of a source hold its weights, and where an index places each tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from quantmill.checkpoint import codes
from quantmill.checkpoint.files import FolderSource, is_plain_name, read_json
from quantmill.findings import Finding, Findings

if TYPE_CHECKING:
    from quantmill.checkpoint.source import Source

__all__ = ["PICKLES", "STEMS", "WeightFiles", "find_weights", "pickle_finding"]

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")
"""File endings of weights that are Python pickles."""
STEMS: Final = ("model", "diffusion_pytorch_model")
"""What peers name weights; files of another name count only where there is none of these."""
_SUFFIX: Final = ".safetensors"
_INDEX: Final = ".safetensors.index.json"
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_SHOWN: Final = 5
"""So many names stand in a message, and as many findings of one kind about an index."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files to read, in order."""

    files: Sequence[str] = ()
    placed: Mapping[str, str] = field(default_factory=dict)
    """The file of each tensor as the index says; empty where there is no index."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """One checkpoint among those that a folder may hold."""

    stem: str
    label: str
    files: tuple[str, ...]
    total: int = 1
    """Of numbered shards: how many there should be."""

    @property
    def is_index(self) -> bool:
        return self.label.endswith(_INDEX)


def pickle_finding(name: str) -> Finding:
    """Why a pickle is refused, and how to convert it."""
    return codes.PICKLE(
        name,
        "pickle files can run code when they are read, so they are refused",
        "convert it where you trust it: load it with torch.load(..., weights_only=True) and save"
        " it with safetensors.torch.save_file",
    )


def find_weights(source: Source, problems: list[Finding], notes: Findings) -> WeightFiles:
    """The weight files of a source. ``problems`` receives errors, ``notes`` warnings.

    An index decides; without one, a file of the usual name; without that, the one file or the
    one set of numbered shards that there is. Several that nothing joins are an error: picking
    one in silence would quantize something else than was meant.

    Raises:
        QuantmillError: the source cannot be listed or its index not be read.
    """
    if isinstance(source, FolderSource) and source.only:
        return WeightFiles([source.only])
    names = source.names()
    choices = _choices(names)
    choices = [item for item in choices if item.stem in STEMS] or choices
    if not choices:
        problems.append(_nothing(source, names))
        return WeightFiles()
    placed: dict[str, str] = {}
    indices = [item for item in choices if item.is_index]
    if len(indices) == 1:
        found = _weight_map(source, indices[0].label, problems)
        if found is None:
            return WeightFiles()
        placed = found
        joined = set(placed.values())
        choices = [item for item in choices if item.is_index or not joined.issuperset(item.files)]
    if len(choices) > 1:
        shown = _some([item.label for item in choices])
        problems.append(
            codes.AMBIGUOUS(
                source.describe(),
                f"it holds several checkpoints and nothing says which is meant: {shown}",
                "give the file itself as the source, or a folder with only one of them",
            )
        )
        return WeightFiles()
    if placed:
        return WeightFiles(sorted(set(placed.values())), placed)
    choice = choices[0]
    if choice.total > 1:
        _check_shards(choice, problems, notes)
    return WeightFiles(choice.files)


def _choices(names: list[str]) -> list[_Choice]:
    found: list[_Choice] = []
    indexed = {name.removesuffix(_INDEX) for name in names if name.endswith(_INDEX)}
    found.extend(_Choice(stem, stem + _INDEX, ()) for stem in sorted(indexed))
    shards: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if not name.endswith(_SUFFIX):
            continue
        numbered = _SHARD.fullmatch(name)
        if numbered is None:
            found.append(_Choice(name.removesuffix(_SUFFIX), name, (name,)))
        elif numbered[1] not in indexed:
            shards.setdefault((numbered[1], int(numbered[3])), []).append(name)
    for (stem, total), files in shards.items():
        found.append(_Choice(stem, files[0], tuple(sorted(files)), total))
    return found


def _nothing(source: Source, names: list[str]) -> Finding:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return pickle_finding(pickles[0])
    others = [name for name in names if name.lower().endswith(".gguf")]
    if others:
        return codes.NO_CHECKPOINT(
            source.describe(),
            f"it holds no safetensors weights, but GGUF files: {_some(others)}",
            "give one of these files itself as the source",
        )
    return codes.NO_CHECKPOINT(
        source.describe(),
        "it holds no safetensors weights",
        "give a model's folder, with model.safetensors or numbered shards and their index",
    )


def _weight_map(source: Source, index: str, problems: list[Finding]) -> dict[str, str] | None:
    """The checked ``weight_map`` of an index, or None with the reasons in ``problems``."""
    data = read_json(source, index, problems, codes.INDEX_INVALID)
    if data is None:
        return None
    table = data.get("weight_map")
    fix = "get the checkpoint again from its source"
    if not isinstance(table, dict) or not table:
        problems.append(codes.INDEX_INVALID(index, "it has no weight_map", fix))
        return None
    files = set()
    for name, file in table.items():
        if not isinstance(file, str):
            cause = f"its weight_map gives no file name for {name!r:.80}"
            problems.append(codes.INDEX_INVALID(index, cause, fix))
            return None
        files.add(file)
    wrong: list[Finding] = []
    for file in sorted(files):
        if not is_plain_name(file):
            cause = f"it names {file!r:.300}, which is no plain file name of this folder"
            wrong.append(codes.UNSAFE_NAME(index, cause, "do not trust this checkpoint"))
        elif file.endswith(PICKLES):
            wrong.append(pickle_finding(file))
        elif not file.endswith(_SUFFIX):
            cause = f"it names {file}, which is no safetensors file"
            wrong.append(codes.INDEX_INVALID(index, cause, fix))
    problems.extend(wrong[:_SHOWN])
    return None if wrong else table


def _check_shards(choice: _Choice, problems: list[Finding], notes: Findings) -> None:
    """Numbered shards without an index: complete, or an error."""
    width = f"{choice.total:05}"
    expected = (f"{choice.stem}-{n:05}-of-{width}{_SUFFIX}" for n in range(1, choice.total + 1))
    present = set(choice.files)
    missing = [name for name in expected if name not in present]
    if missing:
        cause = f"{len(missing)} of {choice.total} numbered shards are missing: {_some(missing)}"
        fix = "get them from where the checkpoint comes from: it was not copied to its end"
        problems.append(codes.SHARD_MISSING(missing[0], cause, fix))
        return
    notes.add(
        codes.NO_INDEX(
            choice.files[0],
            f"no index joins the {choice.total} numbered shards; all of them are read",
            f"nothing to do, or add {choice.stem}{_INDEX}",
        )
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
