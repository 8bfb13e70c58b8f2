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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import code_of, stored_shape
from quantmill.checkpoint.files import is_plain_name
from quantmill.checkpoint.leftovers import hold, remove_leftovers
from quantmill.checkpoint.manifest import MANIFEST_NAME, make_manifest
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CheckpointWriter", "check_new"]

_RESERVED: Final = 1 << 20
"""Bytes kept free for a shard's header: room for some 8,000 tensors; more open a new shard."""
_LONGEST_NAME: Final = 1 << 16
"""Bytes of a tensor's name in a header; with its shape it fits into an empty header."""
_FORMAT: Final = {"format": "pt"}
Metadata = Callable[[Sequence[str], Mapping[str, str]], Mapping[str, str]]


def check_new(folder: Path) -> None:
    """Refuse an output that holds something.

    Raises:
        QuantmillError: ``QM-CKPT-050``, it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QuantmillError(
            codes.OUTPUT_EXISTS(str(folder), "it exists and is not empty", "choose a new folder")
        )


class CheckpointWriter:
    """A context manager; the folder appears under its name at :meth:`commit` and not before.

    Whatever ends the context before that, an error or Ctrl-C, leaves nothing behind. Every method
    raises QuantmillError: ``QM-CKPT-052``, the disk is full; ``053``, it can't be written. Not for
    several threads.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stem: str = "model",
        max_shard_bytes: int = 5 * 10**9,
        manifest: Mapping[str, Any] | None = None,
        header_bytes: int = _RESERVED,
        metadata: Metadata | None = None,
        metadata_bytes: int = 0,
    ) -> None:
        """Nothing is created yet.

        Args:
            folder: where the checkpoint will be; it may exist if it is empty.
            stem: what weight files are called, as in ``model.safetensors``.
            max_shard_bytes: a tensor that does not fit opens a new shard; a longer tensor has a
                shard of its own.
            manifest: what the manifest says besides versions and files.
            header_bytes: room kept for a shard's header; when it is full, a shard is begun.
            metadata: makes the ``__metadata__`` of every shard of the names of all tensors and of
                what :meth:`note` was told; without it there is only the framework's mark.
            metadata_bytes: room kept for that.

        Raises:
            QuantmillError: ``QM-CKPT-050``, ``folder`` exists and is not empty.
        """
        self.folder = Path(folder)
        with self._guard():
            check_new(self.folder)
        self._stem, self._index = stem, f"{stem}.safetensors.index.json"
        self._limit = max_shard_bytes
        self._reserved = min(_RESERVED, -(-max(header_bytes, 1) // 4096) * 4096)
        self._about = dict(manifest or {})
        self._metadata = metadata or (lambda names, notes: notes)
        self._metadata_bytes = max(metadata_bytes, 0)
        self._notes: dict[str, str] = {}
        # Resolved: a link to an empty folder is not what a folder can be renamed to.
        self._target = self.folder.resolve()
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._prefix = f".{self._target.name}.partial-"
        self._work = self._target.parent / f"{self._prefix}{self._token}"
        self._held = contextlib.ExitStack()
        self._made: list[Path] = []
        self._shards: list[_Shard] = []
        self._names: dict[str, int] = {}
        self._files: set[str] = {MANIFEST_NAME}
        self._committed = False

    def __enter__(self) -> CheckpointWriter:
        try:
            with self._guard():
                above = self._target.parents
                self._made = [path for path in above if not path.exists()]
                remove_leftovers(self._target.parent, self._prefix)
                self._work.mkdir(parents=True)
                self._held.enter_context(hold(self._work))
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._committed:
            self._clean()
        self._held.close()

    def _clean(self) -> None:
        """Remove all that was made, parents of the folder included."""
        self._held.close()
        for shard in self._shards:
            shard.abandon()
        shutil.rmtree(self._work, ignore_errors=True)
        for path in self._made:  # The deepest first; one that is in use by now stays.
            with contextlib.suppress(OSError):
                path.rmdir()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where, fix = str(self.folder), "check the path and the rights of the folder"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                cause = f"the disk is full{_free(self.folder)}"
                fix = "free space or choose another disk"
                raise QuantmillError(codes.DISK_FULL(where, cause, fix)) from error
            cause = f"it cannot be written: {error.strerror or error}"
            raise QuantmillError(codes.WRITE_FAILED(where, cause, fix)) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; it is copied first only if it is not contiguous or not on the CPU.

        Raises:
            QuantmillError: ``QM-CKPT-055``, the name was written before; ``056``, safetensors has
                no such dtype or layout; ``057``, the name can't stand in a header.
        """
        if name in self._names:
            raise QuantmillError(codes.WRITTEN_TWICE(name, "it was written before", _bug()))
        dtype = _stored_dtype(name, tensor)
        # A lazy conjugate or negative shares the memory of what it was made from.
        data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        size = data.numel() * data.element_size()
        shape = stored_shape(dtype, tuple(data.shape))
        with self._guard():
            if self._shards and self._shards[-1].full(name, dtype, shape, size, self._limit):
                self._shards[-1].close()
                self._open_shard(name)
            elif not self._shards:
                self._open_shard(name)
            self._shards[-1].add(name, dtype, shape, data, size)
        self._names[name] = len(self._shards) - 1

    def note(self, notes: Mapping[str, str]) -> None:
        """Add to the ``__metadata__`` that every shard will have."""
        self._notes.update(notes)

    def _open_shard(self, first: str) -> None:
        # The first entry must fit, whatever its name: an escaped character takes up to 12 bytes.
        reserve = max(self._reserved, 24 * len(first) + 2048) + self._metadata_bytes
        path = self._work / f"shard-{self._token}-{len(self._shards)}"
        self._shards.append(_Shard(path, -(-reserve // 4096) * 4096, self._metadata_bytes))

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file."""
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError:  # A lone surrogate of a config; escaped it can be written.
            encoded = (json.dumps(data, indent=2) + "\n").encode("ascii")
        self.write_bytes(name, encoded)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file.

        Raises:
            QuantmillError: ``QM-CKPT-055``, the file was written before; ``057``, ``name`` is no
                plain file name.
        """
        if not is_plain_name(name):
            raise QuantmillError(codes.BAD_NAME(repr(name), "it is no plain file name", _bug()))
        if name in self._files:
            raise QuantmillError(codes.WRITTEN_TWICE(name, "it was written before", _bug()))
        self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        with self._guard(), (self._work / name).open("wb") as stream:
            stream.write(data)
        self._files.add(name)

    def commit(self) -> None:
        """Finish every file, write index and manifest, sync, rename.

        Raises:
            QuantmillError: ``QM-CKPT-054``, there is no tensor; ``055``, a file has the name of a
                shard; ``050``, the folder is no longer empty.
        """
        if not self._names:
            raise QuantmillError(
                codes.INCOMPLETE(str(self.folder), "no tensor was written", _bug())
            )
        count = len(self._shards)
        names = [
            self._stem
            + (".safetensors" if count == 1 else f"-{i + 1:05}-of-{count:05}.safetensors")
            for i in range(count)
        ]
        for name in (*names, *([self._index] if count > 1 else [])):
            if name in self._files:
                cause = "a file of this name was written, and it is that of the weights"
                raise QuantmillError(codes.WRITTEN_TWICE(name, cause, _bug()))
        with self._guard():
            self._shards[-1].close()
            about = {**_FORMAT, **self._metadata(list(self._names), self._notes)}
            for shard, name in zip(self._shards, names, strict=True):
                shard.seal(about)
                shard.path.rename(self._work / name)
        if count > 1:
            total = sum(shard.data_bytes for shard in self._shards)
            weight_map = {name: names[index] for name, index in sorted(self._names.items())}
            self.write_json(
                self._index, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        with self._guard():
            manifest = make_manifest(self._work, self._about)
        self._write(
            MANIFEST_NAME,
            (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode("utf-8"),
        )
        with self._guard():
            for path in self._work.iterdir():
                _sync(path)
            _sync(self._work)
            self._publish()

    def _publish(self) -> None:
        """Rename, durably. If the last step fails, the folder is taken back."""
        try:
            self._work.rename(self._target)  # Replaces an empty folder, and only an empty one.
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise QuantmillError(
                codes.OUTPUT_EXISTS(
                    str(self.folder), "something was put there meanwhile", "choose a new folder"
                )
            ) from error
        try:
            _sync(self._target.parent)
            self._committed = True
        except BaseException:
            self._target.rename(self._work)
            raise


_ALIGNED: Final = 64
_SMALL: Final = 1 << 16
"""Shorter tensors of no multiple of ``_ALIGNED`` bytes wait for the end of their shard."""
_GROWTH: Final = 32
"""Bytes by which an entry grows when its offsets do."""


def _opening(metadata: Mapping[str, str]) -> str:
    return '{"__metadata__":' + json.dumps(metadata, separators=(",", ":"))


class _Shard:
    """One safetensors file while it grows."""

    def __init__(self, path: Path, reserved: int, about: int) -> None:
        """``reserved`` bytes are kept for the header, ``about`` of them for its metadata."""
        self.path = path
        self._file = path.open("wb")
        self._reserved = reserved
        self._file.truncate(reserved)
        self._file.seek(reserved)
        self._entries: list[str] = []
        self._odd: list[tuple[int, str, str, tuple[int, ...], bytes]] = []
        self._odd_bytes = 0
        self._header_bytes = len(_opening(_FORMAT)) + 1 + about
        self.data_bytes = 0

    def _entry(self, name: str, dtype: str, shape: tuple[int, ...], size: int) -> str:
        entry = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [self.data_bytes, self.data_bytes + size],
        }
        # ASCII: a length in characters is one in bytes.
        return f",{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}"

    def full(self, name: str, dtype: str, shape: tuple[int, ...], size: int, limit: int) -> bool:
        """Whether a tensor should go into the next shard."""
        if not self._entries and not self._odd:
            return False
        header = self._header_bytes + len(self._entry(name, dtype, shape, size))
        held = self.data_bytes + self._odd_bytes
        return held + size > limit or header + _GROWTH > self._reserved - 8

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Tensor, size: int) -> None:
        if size % _ALIGNED and size < _SMALL:
            # Written last, so that they don't misalign what can be mapped.
            memory = (ctypes.c_char * size).from_address(data.data_ptr()) if size else b""
            self._odd.append((data.element_size(), name, dtype, shape, bytes(memory)))
            self._header_bytes += len(self._entry(name, dtype, shape, size)) + _GROWTH
            self._odd_bytes += size
            return
        entry = self._entry(name, dtype, shape, size)
        if size:
            memory = (ctypes.c_char * size).from_address(data.data_ptr())
            self._file.write(memoryview(memory))
        self.data_bytes += size
        self._header_bytes += len(entry)
        self._entries.append(entry)

    def close(self) -> None:
        """Write what waits; the header is still to come."""
        for _, name, dtype, shape, data in sorted(self._odd, key=lambda item: -item[0]):
            self._entries.append(self._entry(name, dtype, shape, len(data)))
            self._file.write(data)
            self.data_bytes += len(data)
        self._odd.clear()

    def seal(self, about: Mapping[str, str]) -> None:
        """Write the header. Metadata that is longer than was foreseen is a bug of a codec."""
        header = (_opening(about) + "".join(self._entries) + "}").encode("ascii")
        room = self._reserved - 8
        if len(header) > room:
            raise QuantmillError(
                codes.WRITE_FAILED(
                    self.path.name, f"its header has {len(header)} bytes, {room} are kept", _bug()
                )
            )
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room, b" "))
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _bug() -> str:
    return "this is a bug of quantmill or of a plugin: please report it"


def _stored_dtype(name: str, tensor: Tensor) -> str:
    """The safetensors code of what is to be written under ``name``, both checked."""
    import torch

    try:
        bad = name == "__metadata__" or not name.encode()
    except UnicodeEncodeError:
        bad = True
    if bad or len(json.dumps(name)) > _LONGEST_NAME:
        shown = repr(name[:80])
        raise QuantmillError(codes.BAD_NAME(shown, "it can't stand in a header", _bug()))
    cause = ""
    if tensor.layout != torch.strided or tensor.is_quantized:
        cause = f"its layout is {'quantized' if tensor.is_quantized else tensor.layout}"
    elif tensor.device.type == "meta":
        cause = "it is on the meta device and has no data"
    else:
        try:
            return code_of(tensor.dtype)
        except ValueError as error:
            cause = str(error)
    raise QuantmillError(codes.UNWRITABLE(name, cause, _bug()))


def _free(folder: Path) -> str:
    """``; N bytes are free``, of the nearest folder that exists."""
    for path in folder.absolute().parents:
        with contextlib.suppress(OSError):
            return f"; {shutil.disk_usage(path).free:,} bytes are free"
    return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't sync a folder; they order its changes themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
