"""Atomic writer: tensors stream into shards in a temporary folder, renamed when all is there.

A shard's header precedes its data and can't be known before the last tensor. Room for it is
reserved: data begins at a fixed offset, and the header, padded with spaces as the format allows,
is written when the shard is closed. No data is written twice and nothing is kept in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import stored_shape
from quantmill.checkpoint.files import is_plain_name
from quantmill.checkpoint.leftovers import hold, remove_leftovers
from quantmill.checkpoint.manifest import MANIFEST_NAME, make_manifest
from quantmill.checkpoint.shard import FORMAT, Shard, bug, stored_dtype
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CheckpointWriter", "check_new"]

_RESERVED: Final = 1 << 20
"""Bytes kept free for a shard's header: room for some 8,000 tensors; more open a new shard."""
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
        self._shards: list[Shard] = []
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
            raise QuantmillError(codes.WRITTEN_TWICE(name, "it was written before", bug()))
        dtype = stored_dtype(name, tensor)
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
        self._shards.append(Shard(path, -(-reserve // 4096) * 4096, self._metadata_bytes))

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
            raise QuantmillError(codes.BAD_NAME(repr(name), "it is no plain file name", bug()))
        if name in self._files:
            raise QuantmillError(codes.WRITTEN_TWICE(name, "it was written before", bug()))
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
            raise QuantmillError(codes.INCOMPLETE(str(self.folder), "no tensor was written", bug()))
        count = len(self._shards)
        names = [
            self._stem
            + (".safetensors" if count == 1 else f"-{i + 1:05}-of-{count:05}.safetensors")
            for i in range(count)
        ]
        for name in (*names, *([self._index] if count > 1 else [])):
            if name in self._files:
                cause = "a file of this name was written, and it is that of the weights"
                raise QuantmillError(codes.WRITTEN_TWICE(name, cause, bug()))
        with self._guard():
            self._shards[-1].close()
            about = {**FORMAT, **self._metadata(list(self._names), self._notes)}
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
