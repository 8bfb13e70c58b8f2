"""Atomic writer: tensors stream into shards in a temporary folder, renamed when all is there.

A shard's header precedes its data and can't be known before the last tensor. Room for it is
reserved: data begins at a fixed offset, and the header, padded with spaces as the format allows,
is written when the shard is closed. No data is written twice and nothing is kept in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.manifest import MANIFEST_NAME, make_manifest
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CheckpointWriter"]

_RESERVED = 1 << 20
"""Bytes kept free for a shard's header: room for some 8,000 tensors; more open a new shard."""


class CheckpointWriter:
    """A context manager; the folder appears under its name at :meth:`commit` and not before."""

    def __init__(
        self,
        folder: Path,
        *,
        max_shard_bytes: int = 5 * 10**9,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises QuantmillError if ``folder`` exists and is not empty."""
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise QuantmillError(
                codes.OUTPUT_EXISTS(
                    str(folder), "it exists and is not empty", "choose a new folder"
                )
            )
        self._limit = max_shard_bytes
        self._about = dict(manifest or {})
        name = f".{self.folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        self._work = self.folder.absolute().parent / name
        self._shards: list[_Shard] = []
        self._names: dict[str, int] = {}
        self._committed = False

    def __enter__(self) -> CheckpointWriter:
        with self._guard():
            self._work.mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._committed:
            for shard in self._shards:
                shard.abandon()
            shutil.rmtree(self._work, ignore_errors=True)

    @contextlib.contextmanager
    def _guard(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.folder.absolute().parent).free
                raise QuantmillError(
                    codes.DISK_FULL(
                        str(self.folder),
                        f"the disk is full; {free:,} bytes are free",
                        "free space or choose another disk",
                    )
                ) from error
            raise QuantmillError(
                codes.WRITE_FAILED(str(self.folder), str(error), "check the folder's rights")
            ) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a contiguous CPU tensor."""
        if name in self._names:
            raise QuantmillError(codes.WRITTEN_TWICE(name, "it was written before", "a bug"))
        size = tensor.numel() * tensor.element_size()
        with self._guard():
            if not self._shards or self._shards[-1].full(name, size, self._limit):
                if self._shards:
                    self._shards[-1].close()
                self._shards.append(_Shard(self._work / f"shard-{len(self._shards)}"))
            self._names[name] = len(self._shards) - 1
            self._shards[-1].add(name, tensor.contiguous())

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file."""
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file."""
        if Path(name).name != name:
            raise QuantmillError(codes.BAD_NAME(name, "it is no plain file name", "a bug"))
        with self._guard(), (self._work / name).open("wb") as stream:
            stream.write(data)

    def commit(self) -> None:
        """Finish every file, write index and manifest, sync, rename."""
        with self._guard():
            if self._shards:
                self._shards[-1].close()
            count = len(self._shards)
            names = [
                "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
                for i in range(count)
            ]
            for shard, name in zip(self._shards, names, strict=True):
                shard.path.rename(self._work / name)
            if count > 1:
                total = sum(shard.data_bytes for shard in self._shards)
                weight_map = {name: names[index] for name, index in sorted(self._names.items())}
                self.write_json(
                    "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": weight_map},
                )
            self.write_json(MANIFEST_NAME, make_manifest(self._work, self._about))
            for path in self._work.iterdir():
                _sync(path)
            _sync(self._work)
            if self.folder.exists():
                self.folder.rmdir()  # empty, as checked at the start
            self._work.rename(self.folder)
            _sync(self.folder.absolute().parent)
            self._committed = True


class _Shard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._file.truncate(_RESERVED)
        self._file.seek(_RESERVED)
        self._entries: dict[str, dict[str, Any]] = {}
        self._header_bytes = 64
        self.data_bytes = 0

    def full(self, name: str, size: int, limit: int) -> bool:
        if not self._entries:
            return False
        return self.data_bytes + size > limit or self._header_bytes + len(name) + 160 > _RESERVED

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        begin = self.data_bytes
        if size:
            memory = (ctypes.c_char * size).from_address(tensor.data_ptr())
            self._file.write(memoryview(memory))
        self.data_bytes += size
        self._header_bytes += len(name.encode()) + 160
        self._entries[name] = {
            "dtype": code_of(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + size],
        }

    def close(self) -> None:
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")
        ).encode("utf-8")
        room = _RESERVED - 8
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room, b" "))
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
