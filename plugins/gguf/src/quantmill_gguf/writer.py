"""GGUF files, written as a stream: header first, then each tensor as it comes; complete or not
there at all.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.byteorder import swapped
from quantmill_gguf.container import ALIGNMENT, MAGIC, MAX_DIMS, Array
from quantmill_gguf.types.sizes import BY_NAME, TypeSize

__all__ = ["GgufWriter", "TensorSpec"]

_FORMATS: Final = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
_NUMBERS: Final = {number: name for name, (number, _) in _FORMATS.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to come: ``shape`` has the row length last, as in PyTorch."""

    name: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def info(self) -> TypeSize:
        """Number and sizes of its type."""
        return BY_NAME[self.type_name]

    @property
    def nbytes(self) -> int:
        """Bytes in the file.

        Raises:
            ValueError: its rows don't fill the type's blocks.
        """
        columns = self.shape[-1] if self.shape else 1
        if columns % self.info.block or len(self.shape) > MAX_DIMS:
            raise ValueError(f"{self.name}: {list(self.shape)} can't be {self.type_name}")
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.info.row_bytes(columns)


def _kind_of(value: Any) -> str:
    """The value type that a Python value is written as where none was asked for."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "uint32" if 0 <= value < 2**32 else "int64" if value < 2**63 else "uint64"
    return "float32"


class GgufWriter:
    """Writes one file, as a context manager.

    Tensors come in the order of ``tensors``, each whole or by parts (:meth:`write`), or in any
    order (:meth:`put`). The file appears under its name when the block ends without an exception::

        with GgufWriter(path, metadata, specs) as writer:
            writer.write(raw)
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        *,
        kinds: Mapping[str, str | int] | None = None,
        alignment: int = ALIGNMENT,
        big_endian: bool = False,
        version: int = 3,
    ) -> None:
        """``kinds`` are value types by key, as names (``"uint32"``) or numbers; of arrays, of
        the elements."""
        self.path, self.tensors = path, list(tensors)
        self._kinds = dict(kinds or {})
        self._order = ">" if big_endian else "<"
        self._alignment = alignment
        self._stream: IO[bytes] | None = None
        self._temporary = ""
        self._index = 0
        self._places: dict[str, tuple[int, TensorSpec]] = {}
        """Byte offset in the data, and the tensor, by name."""
        self._done = {item.name: 0 for item in self.tensors}
        self._size = 0
        metadata = dict(metadata)
        if alignment != ALIGNMENT:
            metadata["general.alignment"] = alignment
        if len({item.name for item in self.tensors}) != len(self.tensors):
            raise ValueError("two tensors have the same name")
        self._header = self._make_header(metadata, version)

    def _pack(self, kind: str, *values: Any) -> bytes:
        return struct.pack(f"{self._order}{len(values)}{kind}", *values)

    def _text(self, text: str) -> bytes:
        data = text.encode()
        return self._pack("Q", len(data)) + data

    def _value(self, key: str, value: Any) -> bytes:
        asked = self._kinds.get(key)
        name = _NUMBERS.get(asked, "") if isinstance(asked, int) else asked
        if isinstance(value, str):
            return self._pack("I", 8) + self._text(value)
        if isinstance(value, Array):
            name, value = _NUMBERS.get(value.kind, "string"), list(value)
        if isinstance(value, list | tuple):
            return self._pack("I", 9) + self._array(name or "", value)
        number, kind = _FORMATS[name or _kind_of(value)]
        return self._pack("I", number) + self._pack(kind, value)

    def _array(self, name: str, values: Sequence[Any]) -> bytes:
        if name == "string" or (values and isinstance(values[0], str)):
            head = self._pack("I", 8) + self._pack("Q", len(values))
            return head + b"".join(self._text(item) for item in values)
        if not name:
            names = {_kind_of(item) for item in values} or {"uint32"}
            name = names.pop() if len(names) == 1 else "float32"
            if name == "uint32":
                name = "int32" if max(values, default=0) < 2**31 else "uint32"
        number, kind = _FORMATS[name]
        return self._pack("I", number) + self._pack("Q", len(values)) + self._pack(kind, *values)

    def _make_header(self, metadata: Mapping[str, Any], version: int) -> bytes:
        parts = [MAGIC, self._pack("I", version)]
        parts.append(self._pack("Q", len(self.tensors), len(metadata)))
        for key, value in metadata.items():
            parts += [self._text(key), self._value(key, value)]
        offset = 0
        for spec in self.tensors:
            nbytes = spec.nbytes
            parts += [self._text(spec.name), self._pack("I", len(spec.shape))]
            parts.append(self._pack("Q", *reversed(spec.shape)))
            parts.append(self._pack("I", spec.info.number) + self._pack("Q", offset))
            self._places[spec.name] = offset, spec
            offset += nbytes + -nbytes % self._alignment
        self._size = offset
        header = b"".join(parts)
        return header + bytes(-len(header) % self._alignment)

    def __enter__(self) -> GgufWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, self._temporary = tempfile.mkstemp(
                prefix=f".{self.path.name}.", suffix=".part", dir=self.path.parent
            )
            self._stream = os.fdopen(descriptor, "wb")
            self._stream.write(self._header)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        return self

    def write(self, raw: Tensor) -> None:
        """The next little-endian bytes, uint8 of any shape: whole blocks of one tensor."""
        if self._index >= len(self.tensors):
            raise ValueError("no tensor is to be written")
        spec = self.tensors[self._index]
        self.put(spec.name, raw, self._done[spec.name])
        if self._done[spec.name] == spec.nbytes:
            self._index += 1

    def put(self, name: str, raw: Tensor, at: int = 0) -> None:
        """The same for any tensor, from byte ``at`` of it on; each byte is written once."""
        if self._stream is None:
            raise ValueError("the file is not open")
        start, spec = self._places[name]
        data = raw.detach().to("cpu", torch.uint8).contiguous().reshape(-1)
        if at + data.numel() > spec.nbytes or data.numel() % spec.info.size:
            raise ValueError(f"{spec.name} takes {spec.nbytes - at} more bytes")
        if self._order == ">":
            data = swapped(data, spec.info)
        try:
            if data.numel():
                # The tensor's own memory: neither a copy nor NumPy is needed.
                memory = (ctypes.c_char * data.numel()).from_address(data.data_ptr())
                self._stream.seek(len(self._header) + start + at)
                self._stream.write(memory)
            self._done[name] += data.numel()
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()
            return
        self.finish()
        self.publish()

    def finish(self) -> None:
        """Complete the file under its temporary name.

        Raises:
            QuantmillError: it can't be written.
            ValueError: a tensor is not complete.
        """
        assert self._stream is not None
        for spec in self.tensors:
            if self._done[spec.name] != spec.nbytes:
                self.discard()
                raise ValueError(f"{spec.name} was not written")
        try:
            self._stream.truncate(len(self._header) + self._size)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            # As open() would have made it: mkstemp gives rights to the owner alone.
            mask = os.umask(0)
            os.umask(mask)
            Path(self._temporary).chmod(0o666 & ~mask)
        except OSError as problem:
            self.discard()
            raise self._failed(problem) from problem

    def publish(self) -> None:
        """Give the finished file its name.

        Raises:
            QuantmillError: it can't be renamed.
        """
        try:
            Path(self._temporary).replace(self.path)
            self._temporary = ""
        except OSError as problem:
            self.discard()
            raise self._failed(problem) from problem

    def discard(self) -> None:
        """Remove what is there under the temporary name."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
        if self._temporary:
            Path(self._temporary).unlink(missing_ok=True)
            self._temporary = ""

    def _failed(self, error: OSError) -> QuantmillError:
        cause = f"it can't be written: {error.strerror or error}"
        return QuantmillError(
            codes.UNREADABLE(str(self.path), cause, "check the rights and the free space")
        )
