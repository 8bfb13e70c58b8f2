"""Sources: a folder, a file or a Hub repository, read by ranges; and the headers in them."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from quantmill.checkpoint import codes
from quantmill.checkpoint.files import FolderSource, read_json
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader, read_safetensors_header
from quantmill.checkpoint.hub import HubError, HubSource
from quantmill.checkpoint.weights import PICKLES, find_weights, pickle_finding
from quantmill.findings import Finding, Findings, FindingsError, QuantmillError

__all__ = ["FolderSource", "HubSource", "Source", "open_source", "read_headers"]

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
# A missing file of these kinds is a missing file; nobody calls a repository so.
_FILE_ENDINGS: Final = (".safetensors", ".gguf", ".json", *PICKLES)
_REQUESTS: Final = 8
"""Headers of so many shards are asked for at the same time, from a Hub."""

_Header = tuple[int, dict[str, TensorHeader], dict[str, str]]


class Source(Protocol):
    """Where a checkpoint lies. Names are plain file names relative to it.

    All methods raise QuantmillError, and no other error, where the place cannot be read.
    """

    def names(self) -> list[str]:
        """Names of the files, sorted."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; any text may be asked for."""

    def size(self, name: str) -> int:
        """Bytes of an existing file."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an existing file; fewer where the file ends before."""

    def local_path(self, name: str) -> Path:
        """The whole file on this machine, downloaded if need be."""

    def describe(self) -> str:
        """How a user would name the source."""

    def identity(self) -> str:
        """A text that changes when the weights do."""


def open_source(spec: str | Path) -> Source:
    """A source from what a user wrote: a folder, a file, or a Hub id ``org/name@revision``.

    Raises:
        QuantmillError: nothing is there, or it is a kind of file that no installed plugin reads.
    """
    path = Path(spec)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # No right to look, or a name that is too long.
        raise QuantmillError(
            codes.SOURCE_MISSING(
                str(spec)[:200],
                f"it cannot be looked at: {error.strerror or error}",
                "check the path and the rights",
            )
        ) from error
    if is_folder:
        return FolderSource(path)
    if is_file:
        if path.suffix == ".safetensors":
            return FolderSource(path.parent, path.name)
        if path.suffix in PICKLES:
            raise QuantmillError(pickle_finding(path.name))
        raise QuantmillError(
            codes.FOREIGN_FILE(
                str(spec),
                "no installed plugin reads this kind of file",
                "give a folder; for GGUF install quantmill-gguf",
            )
        )
    text = str(spec)
    is_path = text.startswith((".", "/", "~", os.sep)) or text.endswith(_FILE_ENDINGS)
    if _HUB_ID.fullmatch(text) and not is_path:
        repo, _, revision = text.partition("@")
        return HubSource(repo, revision or "main")
    if is_path or path.is_absolute():
        raise QuantmillError(
            codes.SOURCE_MISSING(text, "there is no such folder or file", "check the path")
        )
    raise QuantmillError(
        codes.BAD_SPEC(
            text[:200],
            "there is no such folder or file, and a Hub id has the form org/name@revision",
            "check the path or the Hub id",
        )
    )


def read_headers(source: Source) -> CheckpointHeaders:
    """All headers of a checkpoint; no weight is read. Warnings are in its ``findings``.

    Raises:
        FindingsError: every problem of every file at once.
        QuantmillError: the source cannot be read at all.
    """
    if isinstance(source, HubSource) and source.kept is not None:
        # A commit never changes. Callers may edit the config, so each gets its own.
        kept: CheckpointHeaders = source.kept
        return dataclasses.replace(
            kept, config=copy.deepcopy(kept.config), findings=Findings(kept.findings)
        )
    problems: list[Finding] = []
    notes = Findings()
    config = read_json(source, "config.json", problems) or {}
    generation = read_json(source, "generation_config.json", problems)
    weights = find_weights(source, problems, notes)
    tensors: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for file, answer in zip(weights.files, _read_each(source, weights.files), strict=True):
        if isinstance(answer, QuantmillError):
            problems.extend(answer.findings)
            continue
        sizes[file], found, extra = answer
        _join(tensors, found, file, weights.placed, problems, notes)
        metadata = {**extra, **metadata}
    if not problems:
        _check_placed(tensors, weights.placed, problems)
    if problems:
        raise FindingsError(problems)
    headers = CheckpointHeaders(tensors, metadata, sizes, config, generation, source, notes)
    if isinstance(source, HubSource):
        source.kept = dataclasses.replace(
            headers, config=copy.deepcopy(config), findings=Findings(notes)
        )
    return headers


def _read_one(source: Source, file: str) -> _Header | QuantmillError:
    """Size, tensors and metadata of one file, or what is wrong with it."""
    if not source.exists(file):
        if isinstance(source, HubSource) and source.offline:
            return QuantmillError(source.not_cached(file))
        return QuantmillError(
            codes.SHARD_MISSING(
                file,
                "the index places tensors in it, and the folder has no such file",
                "the checkpoint was not copied or written to its end: get this file, or all of it,"
                " from where it comes from",
            )
        )
    try:
        size = source.size(file)
        found, extra = read_safetensors_header(
            lambda start, stop: source.read(file, start, stop), size, file
        )
    except HubError:
        raise  # The place is at fault, not the file: the other files would say the same.
    except QuantmillError as error:
        return error
    return size, found, extra


def _read_each(source: Source, files: Sequence[str]) -> Iterator[_Header | QuantmillError]:
    if not isinstance(source, HubSource) or len(files) < 2:
        for file in files:
            yield _read_one(source, file)
        return
    pool = ThreadPoolExecutor(min(_REQUESTS, len(files)), thread_name_prefix="quantmill-hub")
    try:
        yield from pool.map(lambda file: _read_one(source, file), files)
    finally:
        pool.shutdown(cancel_futures=True)


def _join(
    tensors: dict[str, TensorHeader],
    found: dict[str, TensorHeader],
    file: str,
    placed: Mapping[str, str],
    problems: list[Finding],
    notes: Findings,
) -> None:
    """Add the tensors of one file to those of all, each from the file where it belongs."""
    stray = [name for name in found if placed.get(name) != file] if placed else []
    if stray:
        elsewhere = [name for name in stray if name in placed]
        unknown = [name for name in stray if name not in placed]
        for names, what in (
            (elsewhere, "which the index places in another file, where they are read"),
            (unknown, "which the index does not name; they are read"),
        ):
            if names:
                cause = f"it holds {len(names)} tensors, {names[0]!r:.120} first, {what}"
                notes.add(codes.NOT_INDEXED(file, cause, "nothing to do, or write the index anew"))
        found = {name: item for name, item in found.items() if placed.get(name, file) == file}
    for name in sorted(tensors.keys() & found.keys()):
        cause = f"tensor {name!r:.120} is in {tensors[name].file} as well"
        fix = "remove one of the files, or add an index that says which is meant"
        problems.append(codes.DUPLICATE_TENSOR(file, cause, fix, tensor=name))
    tensors |= found


def _check_placed(
    tensors: Mapping[str, TensorHeader], placed: Mapping[str, str], problems: list[Finding]
) -> None:
    """Every tensor of the index must be where the index says."""
    lacking: dict[str, list[str]] = {}
    for name, file in placed.items():
        if name not in tensors:
            lacking.setdefault(file, []).append(name)
    for file, names in sorted(lacking.items()):
        cause = (
            f"the index places {len(names)} tensors there that it lacks, {names[0]!r:.120} first"
        )
        fix = "get the checkpoint again: the index and the file are of different versions"
        problems.append(codes.INDEX_TENSOR(file, cause, fix, tensors=names))
