"""Importance matrices of llama.cpp: sums of squared inputs, by tensor, in both of its formats.

The newer one is a GGUF file with two tensors for each weight, ``NAME.in_sum2`` (float32
``[matrices, columns]``, sums of squares) and ``NAME.counts`` (``[matrices, 1]``, tokens), where
stacked experts are several matrices. The older one (``.dat``) has, little-endian::

    i32 entries
    entry: i32 bytes of the name, the name, i32 calls, i32 values, f32 values (mean square x calls)
    i32 chunks, i32 bytes of the text's name, the name        may be missing

Source: ``tools/imatrix/imatrix.cpp`` and ``common/imatrix-loader.cpp`` of llama.cpp.
"""

from __future__ import annotations

import os
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.byteorder import swapped
from quantmill_gguf.container import MAGIC, Array, GgufFile, GgufTensor
from quantmill_gguf.writer import GgufWriter, TensorSpec

__all__ = ["COUNTS", "SUFFIXES", "Entry", "Imatrix"]

COUNTS = ("quantize.imatrix.entries_count", "quantize.imatrix.chunks_count")
"""Keys of :meth:`Imatrix.facts` that are numbers."""

SUFFIXES = (".gguf", ".dat")
"""Endings of the two formats."""
_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "compute the importance matrix again"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of the inputs of one tensor."""

    sums: Tensor
    """Sums of squares, float32 ``[matrices, columns]``. The older format tells no matrices: one."""
    counts: Tensor
    """Inputs of each matrix, float32 ``[matrices]``."""

    def mean(self) -> Tensor:
        """Mean squares, float32 of the shape of ``sums``; 1 for a matrix without any input."""
        counts = self.counts.unsqueeze(1)
        return torch.where(counts > 0, self.sums / counts.clamp(min=1.0), 1.0)


@dataclass(slots=True)
class Imatrix:
    """A whole importance matrix."""

    entries: dict[str, Entry]
    """By tensor name."""
    chunks: int = 0
    """Windows of text that it is of."""
    chunk_size: int = 1
    """Tokens of each; 1 where counts are of windows (the older format)."""
    texts: list[str] = field(default_factory=list)
    """Names of the texts."""

    @classmethod
    def read(cls, path: Path) -> Imatrix:
        """Read a file of either format.

        Raises:
            QuantmillError: ``QM-GGUF-033``, it can't be read, or is none; a code of GGUF files.
        """
        try:
            with path.open("rb") as stream:
                newer = stream.read(4) == MAGIC
                size = stream.seek(0, os.SEEK_END)
        except OSError as error:
            _refuse(path, f"it can't be opened: {error.strerror or error}", "check the path")
        if not newer:
            return _Older(path, size).read()
        return _newer(GgufFile.open(path))

    def facts(self, path: Path) -> dict[str, str | int]:
        """Where a file's importance came from, under the keys that llama-quantize writes."""
        found: dict[str, str | int] = {"quantize.imatrix.file": path.name}
        if self.texts:
            found["quantize.imatrix.dataset"] = Path(self.texts[0]).name
        found["quantize.imatrix.entries_count"] = len(self.entries)
        if self.chunks:
            found["quantize.imatrix.chunks_count"] = self.chunks
        return found

    def write(self, path: Path) -> None:
        """Write a file in the format that its ending names.

        Raises:
            QuantmillError: it can't be written; nothing is left behind.
        """
        if path.suffix.lower() == ".dat":
            self._write_older(path)
            return
        specs = []
        for name, entry in sorted(self.entries.items()):
            matrices, columns = entry.sums.shape
            several = (matrices,) if matrices > 1 else ()
            specs.append(TensorSpec(name + _SUMS, "F32", (*several, columns)))
            specs.append(TensorSpec(name + _COUNTS, "F32", (*several, 1)))
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": self.texts,
            "imatrix.chunk_count": self.chunks,
            "imatrix.chunk_size": self.chunk_size,
        }
        kinds = {"imatrix.datasets": "string"}
        with GgufWriter(path, metadata, specs, kinds=kinds) as writer:
            for _, entry in sorted(self.entries.items()):
                for tensor in (entry.sums, entry.counts):
                    writer.write(tensor.to(torch.float32).contiguous().view(torch.uint8))

    def _write_older(self, path: Path) -> None:
        parts = []
        # An entry without any input says nothing, and can't be told from one of zeros there.
        kept = {name: item for name, item in self.entries.items() if bool((item.counts > 0).any())}
        parts.append(struct.pack("<i", len(kept)))
        for name, entry in sorted(kept.items()):
            calls = -(-int(entry.counts.max()) // max(1, self.chunk_size))
            label = name.encode()
            parts.append(struct.pack("<i", len(label)) + label)
            parts.append(struct.pack("<ii", calls, entry.sums.numel()))
            parts.append((entry.mean() * float(calls)).contiguous().numpy().tobytes())
        label = (self.texts[-1] if self.texts else "").encode()
        parts.append(struct.pack("<ii", self.chunks, len(label)) + label)
        temporary = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".part", dir=path.parent
            )
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(b"".join(parts))
                stream.flush()
                os.fsync(stream.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(temporary).chmod(0o666 & ~mask)
            Path(temporary).replace(path)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            cause = f"it can't be written: {error.strerror or error}"
            fix = "check the rights and the free space"
            raise QuantmillError(codes.UNREADABLE(str(path), cause, fix)) from error


def _refuse(path: Path, cause: str, fix: str = _AGAIN) -> NoReturn:
    raise QuantmillError(codes.IMPORTANCE(str(path), cause, fix))


def _checked(path: Path, name: str, sums: Tensor, counts: Tensor) -> Entry:
    if not bool((torch.isfinite(sums) & (sums >= 0)).all()):
        _refuse(path, f"{name!r:.90} has a value that is negative, NaN or infinite")
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        _refuse(path, f"{name!r:.90} has a count that is negative, NaN or infinite")
    return Entry(sums, counts)


class _Older:
    """A file of the older format; every length is held against what is left."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self.data = path.read_bytes() if size else b""

    def read(self) -> Imatrix:
        count = self._number("the number of entries")
        # The least an entry takes: three lengths, a letter and a value.
        if count < 1 or count * 17 > self.size:
            _refuse(
                self.path,
                f"it claims {count} entries in {self.size} bytes: it is no importance matrix",
                "give a file of llama-imatrix or of quantmill imatrix",
            )
        found: dict[str, Entry] = {}
        for index in range(count):
            name = self._text(f"the name of entry {index}")
            calls = self._number(f"the calls of {name!r:.90}")
            values = self._number(f"the values of {name!r:.90}")
            if values < 1 or calls < 0:
                _refuse(self.path, f"{name!r:.90} has {values} values of {calls} calls")
            raw = self._take(4 * values, f"the values of {name!r:.90}")
            if name in found:
                _refuse(self.path, f"{name!r:.90} is there twice")
            sums = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(1, -1)
            # Without calls the values are means already.
            found[name] = _checked(self.path, name, sums, torch.tensor([float(calls or 1)]))
        if self.position == self.size:
            return Imatrix(found)
        chunks = self._number("the number of chunks")
        text = self._text("the name of the text") if self.position < self.size else ""
        return Imatrix(found, max(0, chunks), 1, [text] if text else [])

    def _take(self, count: int, what: str) -> bytes:
        left = self.size - self.position
        if not 0 <= count <= left:
            _refuse(self.path, f"{what} needs {count} bytes, and {left} are left: it ends early")
        self.position += count
        return self.data[self.position - count : self.position]

    def _number(self, what: str) -> int:
        value: int = struct.unpack("<i", self._take(4, what))[0]
        return value

    def _text(self, what: str) -> str:
        return self._take(self._number(what), what).decode("utf-8", "replace")


def _newer(file: GgufFile) -> Imatrix:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        _refuse(
            file.path,
            f"its general.type is {kind!r:.40}, not 'imatrix'",
            "give a file of llama-imatrix or of quantmill imatrix",
        )
    found: dict[str, Entry] = {}
    names = {name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)}
    names |= {name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)}
    if not names:
        _refuse(file.path, "it has no entry")
    for name in sorted(names):
        pair = file.tensors.get(name + _SUMS), file.tensors.get(name + _COUNTS)
        if pair[0] is None or pair[1] is None:
            _refuse(file.path, f"{name!r:.90} lacks its {_COUNTS if pair[0] else _SUMS}")
        sums, counts = _floats(file, pair[0]), _floats(file, pair[1])
        if not counts.numel() or not sums.numel() or sums.numel() % counts.numel():
            cause = f"{name!r:.90} has {sums.numel()} sums for {counts.numel()} counts"
            _refuse(file.path, cause)
        sums = sums.reshape(counts.numel(), -1)
        found[name] = _checked(file.path, name, sums, counts)
    chunks, size = (file.metadata.get(f"imatrix.{key}") for key in ("chunk_count", "chunk_size"))
    texts = file.metadata.get("imatrix.datasets")
    return Imatrix(
        found,
        chunks if isinstance(chunks, int) else 0,
        size if isinstance(size, int) and size > 0 else 1,
        [str(item) for item in texts] if isinstance(texts, Array) else [],
    )


def _floats(file: GgufFile, tensor: GgufTensor) -> Tensor:
    if tensor.type.name != "F32":
        _refuse(file.path, f"{tensor.name!r:.90} is {tensor.type.name}, not F32")
    raw = bytearray(file.data[tensor.start : tensor.stop])
    if not raw:
        return torch.empty(0)
    data = torch.frombuffer(raw, dtype=torch.uint8)
    data = swapped(data, tensor.type) if file.big_endian else data
    return data.view(torch.float32)
