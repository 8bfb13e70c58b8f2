"""Sources: a folder, a file or a Hub repository, read by ranges; and the headers in them."""

from __future__ import annotations

import json
import os
import re
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from quantmill.checkpoint import codes
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader, read_safetensors_header
from quantmill.findings import Finding, FindingsError, QuantmillError

__all__ = ["FolderSource", "HubSource", "Source", "open_source", "read_headers"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_STEMS = ("model", "diffusion_pytorch_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Source(Protocol):
    """Where a checkpoint lies. Names are plain file names relative to it."""

    def names(self) -> list[str]: ...
    def exists(self, name: str) -> bool: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, start: int, stop: int) -> bytes: ...
    def local_path(self, name: str) -> Path: ...
    def describe(self) -> str: ...
    def identity(self) -> str: ...


class FolderSource:
    """A local folder; with ``only``, one file of it."""

    def __init__(self, path: Path, only: str | None = None) -> None:
        self.path = path
        self.only = only

    def names(self) -> list[str]:
        """Names of the files."""
        return sorted(item.name for item in self.path.iterdir() if item.is_file())

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.path / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``."""
        with (self.path / name).open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def local_path(self, name: str) -> Path:
        """The file itself."""
        return self.path / name

    def describe(self) -> str:
        """The path as the user gave it."""
        return str(self.path / self.only if self.only else self.path)

    def identity(self) -> str:
        """Changes when a weight file does."""
        parts = [
            f"{name}:{self.size(name)}:{(self.path / name).stat().st_mtime_ns}"
            for name in self.names()
            if name.endswith(".safetensors")
        ]
        return f"{self.path.resolve()}|" + "|".join(parts)


class HubSource:
    """A repository of the Hub; only the ranges that are asked for are transferred."""

    def __init__(self, repo_id: str, revision: str = "main") -> None:
        self.repo_id = repo_id
        self.revision = revision

    @cached_property
    def _sizes(self) -> dict[str, int]:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(self.repo_id, revision=self.revision, files_metadata=True)
        except Exception as error:
            raise QuantmillError(
                codes.SOURCE_MISSING(
                    self.describe(),
                    f"the Hub does not give it: {type(error).__name__}: {error}".split("\n")[0],
                    "check the name, the revision, the token and the network",
                )
            ) from error
        return {item.rfilename: item.size or 0 for item in info.siblings or ()}

    def names(self) -> list[str]:
        """Names of the files."""
        return sorted(self._sizes)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return name in self._sizes

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._sizes[name]

    def read(self, name: str, start: int, stop: int) -> bytes:
        """One range request."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers

        url = hf_hub_url(self.repo_id, name, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        response = get_session().get(url, headers=headers)
        response.raise_for_status()
        data: bytes = response.content
        return data if len(data) <= stop - start else data[start:stop]

    def local_path(self, name: str) -> Path:
        """Download the file into the Hub's cache."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo_id, name, revision=self.revision))

    def describe(self) -> str:
        """``org/name@revision``."""
        return f"{self.repo_id}@{self.revision}"

    def identity(self) -> str:
        """The same; a branch name may move, a commit may not."""
        return self.describe()


def open_source(spec: str | Path) -> Source:
    """A source from what a user wrote: a folder, a file, or a Hub id ``org/name@revision``.

    Raises:
        QuantmillError: nothing is there, or it is a kind of file that no installed plugin reads.
    """
    path = Path(spec)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            return FolderSource(path.parent, path.name)
        if path.suffix in _PICKLES:
            raise QuantmillError(_pickle(path.name))
        raise QuantmillError(
            codes.SOURCE_MISSING(
                str(spec),
                "no installed plugin reads this kind of file",
                "give a folder; for GGUF install quantmill-gguf",
            )
        )
    text = str(spec)
    if _HUB_ID.fullmatch(text) and not text.startswith((".", "/", os.sep)):
        repo, _, revision = text.partition("@")
        return HubSource(repo, revision or "main")
    raise QuantmillError(
        codes.SOURCE_MISSING(
            text, "there is no such folder or file", "check the path or the Hub id"
        )
    )


def _pickle(name: str) -> Finding:
    return codes.PICKLE(
        name,
        "pickle files can run code when they are read, so they are refused",
        "convert it where you trust it: load it with torch.load(..., weights_only=True) and save"
        " it with safetensors.torch.save_file",
    )


def read_headers(source: Source) -> CheckpointHeaders:
    """All headers of a checkpoint; no weight is read.

    Raises:
        FindingsError: every problem of every file at once.
    """
    problems: list[Finding] = []
    config = _json(source, "config.json", problems) or {}
    generation = _json(source, "generation_config.json", [])
    files, weight_map = _weight_files(source, problems)
    tensors: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for file in files:
        if not source.exists(file):
            problems.append(
                codes.SHARD_MISSING(file, "the index names it and it is not there", "add the file")
            )
            continue
        sizes[file] = source.size(file)
        try:
            found, extra = read_safetensors_header(
                lambda start, stop, file=file: source.read(file, start, stop),  # type: ignore[misc]
                sizes[file],
                file,
            )
        except QuantmillError as error:
            problems.extend(error.findings)
            continue
        tensors |= found
        metadata = {**extra, **metadata}
    if weight_map and not problems:
        for name in sorted(set(weight_map) - set(tensors)):
            problems.append(
                codes.INDEX_TENSOR(
                    name,
                    f"the index says it is in {weight_map[name]}, which lacks it",
                    "get the checkpoint again",
                )
            )
    if problems:
        raise FindingsError(problems)
    return CheckpointHeaders(tensors, metadata, sizes, config, generation, source)


def _json(source: Source, name: str, problems: list[Finding]) -> dict[str, Any] | None:
    if not source.exists(name):
        return None
    try:
        data = json.loads(source.read(name, 0, source.size(name)))
        if not isinstance(data, dict):
            raise ValueError("it is no object")
    except (ValueError, UnicodeDecodeError) as error:
        problems.append(codes.JSON_INVALID(name, f"not valid JSON: {error}", "correct the file"))
        return None
    return data


def _weight_files(source: Source, problems: list[Finding]) -> tuple[list[str], dict[str, str]]:
    if isinstance(source, FolderSource) and source.only:
        return [source.only], {}
    names = source.names()
    for stem in _STEMS:
        index = f"{stem}.safetensors.index.json"
        if index in names:
            data = _json(source, index, problems) or {}
            weight_map = data.get("weight_map")
            if not isinstance(weight_map, dict):
                problems.append(
                    codes.JSON_INVALID(index, "it has no weight_map", "correct the file")
                )
                return [], {}
            files = []
            for file in sorted(set(map(str, weight_map.values()))):
                if PurePosixPath(file).name != file or file in ("..", ".") or "\\" in file:
                    problems.append(
                        codes.UNSAFE_NAME(
                            index,
                            f"it names {file!r}, which is outside the folder",
                            "do not trust this checkpoint",
                        )
                    )
                    continue
                files.append(file)
            return files, weight_map
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"], {}
    lone = [name for name in names if name.endswith(".safetensors")]
    if lone:
        return lone, {}
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        problems.append(_pickle(pickles[0]))
    else:
        problems.append(
            codes.SOURCE_MISSING(
                source.describe(), "it holds no safetensors weights", "give a model's folder"
            )
        )
    return [], {}
