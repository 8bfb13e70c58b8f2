"""GGUF files: metadata and the places of tensors, memory-mapped; no weight is read.

Nothing of a file is believed before it is checked: every count, length, offset and dimension is
bounded by the size of the file before it is used. This module does not import PyTorch.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from quantmill.findings import FindingCode, QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.types.sizes import BY_NUMBER, TypeSize

__all__ = ["Array", "GgufFile", "GgufTensor", "open_split", "parse"]

MAGIC: Final = b"GGUF"
ALIGNMENT: Final = 32
"""Of tensor data, where the file does not say otherwise."""
_MOST_ALIGNED: Final = 1 << 20
MAX_DIMS: Final = 4
_MAX_ENTRIES: Final = 1 << 15
"""Keys, and tensors, of a file: some ten times what any model has. A small file can claim more of
them than its size bounds usefully, since each costs more in memory than in the file."""
_MAX_KEY: Final = (1 << 16) - 1
"""Bytes of a name, as the specification has it."""
_MAX_TEXTS: Final = 16 << 20
"""Bytes of all texts that are no part of an array."""
_AGAIN: Final = "the file is damaged or was cut off: get it again from its source"
_MAX_ELEMENTS: Final = 2**63 - 1
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value types of metadata, as formats of :mod:`struct`."""
_SPLIT_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

Buffer = bytes | bytearray | mmap.mmap


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies and what it is. ``shape`` has the row length last, as in PyTorch;
    ``start`` is an absolute byte offset."""

    name: str
    type: TypeSize
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        """The first byte behind it."""
        return self.start + self.nbytes

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Array:
    """An array of metadata, checked when the file was read and decoded when it is asked for."""

    kind: int
    """Value type of the elements."""
    count: int
    start: int
    stop: int
    order: str
    data: Buffer

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        if self.kind != _STRING:
            yield from struct.unpack(
                f"{self.order}{self.count}{_SCALARS[self.kind]}", self.data[self.start : self.stop]
            )
            return
        position, length = self.start, struct.Struct(self.order + "Q")
        for _ in range(self.count):
            (size,) = length.unpack_from(self.data, position)
            position += 8 + size
            yield bytes(self.data[position - size : position]).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """All a file says of itself."""

    path: Path
    version: int
    big_endian: bool
    metadata: Mapping[str, Any]
    """Numbers, texts, truth values and :class:`Array`."""
    kinds: Mapping[str, int]
    """Value type of each key, for writing the same again."""
    tensors: Mapping[str, GgufTensor]
    alignment: int
    size: int
    data: Buffer
    """The mapped file."""

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Map and check a file.

        Raises:
            QuantmillError: ``QM-GGUF-014``, it can't be opened; ``001`` to ``013``, it is damaged.
        """
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                mapped: Buffer = (
                    # Private pages: who writes to a tensor in them changes no file.
                    mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
                )
        except OSError as error:
            cause = f"it can't be opened: {error.strerror or error}"
            raise QuantmillError(
                codes.UNREADABLE(str(path), cause, "check the path and the rights")
            ) from error
        return parse(mapped, path)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


class _Cursor:
    """A position in the file that never leaves it."""

    def __init__(self, data: Buffer, file: str) -> None:
        self.data, self.file, self.size = data, file, len(data)
        self.position = 0
        self.order = "<"
        self.texts = 0
        """Bytes of the texts that were kept."""

    def error(self, code: FindingCode, cause: str, fix: str = _AGAIN) -> QuantmillError:
        return QuantmillError(code(self.file, cause, fix))

    @property
    def left(self) -> int:
        return self.size - self.position

    def need(self, count: int, what: str) -> None:
        if count > self.left:
            cause = f"{what} at byte {self.position} needs {count} bytes, and {self.left} are left"
            raise self.error(codes.TRUNCATED, cause)

    def number(self, kind: str, what: str) -> Any:
        width = struct.calcsize("<" + kind)
        self.need(width, what)
        (value,) = struct.unpack_from(self.order + kind, self.data, self.position)
        self.position += width
        return value

    def count(self, least: int, what: str, most: int | None = None) -> int:
        """A count of things that take at least ``least`` bytes each."""
        value: int = self.number("Q", what)
        if value * least > self.left:
            cause = f"{what} is {value}, and {self.left} bytes are left"
            raise self.error(codes.COUNT, cause)
        if most is not None and value > most:
            raise self.error(codes.COUNT, f"{what} is {value}; up to {most} are read")
        return value

    def skip_text(self, what: str, most: int | None = None) -> bytes:
        length = self.number("Q", what)
        if length > self.left:
            cause = (
                f"{what} at byte {self.position} claims {length} bytes, and {self.left} are left"
            )
            raise self.error(codes.STRING, cause)
        self.texts += length
        if (most is not None and length > most) or self.texts > _MAX_TEXTS:
            limit = _MAX_TEXTS if most is None or length <= most else most
            cause = f"with {what} at byte {self.position} texts are longer than {limit} bytes"
            raise self.error(codes.STRING, cause)
        start = self.position
        self.position += length
        return bytes(self.data[start : self.position])

    def text(self, what: str) -> str:
        try:
            return self.skip_text(what, _MAX_KEY).decode("utf-8")
        except UnicodeDecodeError:
            cause = f"{what} before byte {self.position} is not UTF-8"
            raise self.error(codes.STRING, cause) from None

    def value(self, key: str) -> tuple[Any, int]:
        kind = self.number("I", f"the type of {_shown(key)}")
        if kind in _SCALARS:
            if kind == 7:
                return bool(self.number("B", _shown(key))), kind
            return self.number(_SCALARS[kind], _shown(key)), kind
        if kind == _STRING:
            return self.skip_text(_shown(key)).decode("utf-8", "replace"), kind
        if kind == _ARRAY:
            return self.array(key), kind
        raise self.error(codes.METADATA, f"{_shown(key)} has the unknown value type {kind}")

    def array(self, key: str) -> Array:
        kind = self.number("I", f"the element type of {_shown(key)}")
        if kind == _ARRAY:
            raise self.error(
                codes.METADATA, f"{_shown(key)} is an array of arrays, which is not read"
            )
        if kind != _STRING and kind not in _SCALARS:
            raise self.error(
                codes.METADATA, f"{_shown(key)} is an array of the unknown type {kind}"
            )
        width = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
        count = self.count(width, f"the length of {_shown(key)}")
        start = self.position
        if kind == _STRING:
            length = struct.Struct(self.order + "Q")
            for index in range(count):
                self.need(8, f"text {index} of {_shown(key)}")
                (size,) = length.unpack_from(self.data, self.position)
                self.position += 8
                if size > self.left:
                    cause = f"text {index} of {_shown(key)} claims {size} bytes"
                    raise self.error(codes.STRING, f"{cause}, and {self.left} are left")
                self.position += size
        else:
            self.position += count * width
        return Array(kind, count, start, self.position, self.order, self.data)


def parse(data: Buffer, path: Path) -> GgufFile:
    """Check the bytes of a file; ``path`` is for messages.

    Raises:
        QuantmillError: ``QM-GGUF-001`` to ``012``.
    """
    cursor = _Cursor(data, path.name)
    if bytes(data[:4]) != MAGIC:
        fix = "give a GGUF file; files of the older formats must be converted with llama.cpp"
        raise cursor.error(
            codes.NOT_GGUF, f"it starts with {bytes(data[:4])!r}, not {MAGIC!r}", fix
        )
    cursor.position = 4
    version = cursor.number("I", "the version")
    if version and not version & 0xFFFF:
        # A small number whose bytes are swapped.
        cursor.order, cursor.position = ">", 4
        version = cursor.number("I", "the version")
    if version not in (2, 3):
        fix = "convert the model again with a current llama.cpp" if version == 1 else _AGAIN
        raise cursor.error(codes.VERSION, f"it is of version {version}; 2 and 3 are read", fix)
    # The least a tensor takes: an empty name, no dimension, a type and an offset; then a key.
    tensor_count = cursor.count(8 + 4 + 4 + 8, "the number of tensors", _MAX_ENTRIES)
    key_count = cursor.count(8 + 4 + 1, "the number of metadata keys", _MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for index in range(key_count):
        key = cursor.text(f"metadata key {index}")
        if key in metadata:
            raise cursor.error(codes.DUPLICATE, f"the metadata key {_shown(key)} is there twice")
        metadata[key], kinds[key] = cursor.value(key)
    alignment = _alignment(cursor, metadata)
    entries = [_entry(cursor, index) for index in range(tensor_count)]
    base = -(-cursor.position // alignment) * alignment
    tensors = _placed(cursor, entries, base, alignment)
    big = cursor.order == ">"
    return GgufFile(path, version, big, metadata, kinds, tensors, alignment, len(data), data)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_ALIGNED
    if not good or value & (value - 1):
        raise cursor.error(
            codes.ALIGNMENT,
            f"general.alignment is {value!r:.60}, not a power of two up to {_MOST_ALIGNED}",
        )
    return int(value)


_Entry = tuple[str, TypeSize, tuple[int, ...], int, int]


def _entry(cursor: _Cursor, index: int) -> _Entry:
    """Name, type, shape, relative offset and bytes of one tensor."""
    name = cursor.text(f"the name of tensor {index}")
    count = cursor.number("I", f"the number of dimensions of {_shown(name)}")
    if count > MAX_DIMS:
        raise cursor.error(codes.DIMENSIONS, f"tensor {_shown(name)} has {count} dimensions")
    dims = [cursor.number("Q", f"a dimension of {_shown(name)}") for _ in range(count)]
    number = cursor.number("I", f"the type of {_shown(name)}")
    offset = cursor.number("Q", f"the offset of {_shown(name)}")
    kind = BY_NUMBER.get(number)
    if kind is None:
        fix = "a newer quantmill-gguf may know it; otherwise the file is damaged"
        raise cursor.error(codes.TYPE, f"tensor {_shown(name)} has the type number {number}", fix)
    if math.prod(max(dim, 1) for dim in dims) > _MAX_ELEMENTS:
        raise cursor.error(
            codes.DIMENSIONS, f"tensor {_shown(name)} has over 2**63 elements: {dims}"
        )
    row = dims[0] if dims else 1
    if row % kind.block:
        cause = f"tensor {_shown(name)} has rows of {row}, and {kind.name} blocks of {kind.block}"
        raise cursor.error(codes.DIMENSIONS, cause)
    nbytes = math.prod(dims) // kind.block * kind.size
    return name, kind, tuple(reversed(dims)), offset, nbytes


def _placed(
    cursor: _Cursor, entries: list[_Entry], base: int, alignment: int
) -> dict[str, GgufTensor]:
    room = max(0, cursor.size - base)
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset, nbytes in entries:
        if name in tensors:
            raise cursor.error(codes.DUPLICATE, f"the tensor {_shown(name)} is there twice")
        if offset % alignment:
            cause = f"tensor {_shown(name)} is at {offset}, no multiple of {alignment}"
            raise cursor.error(codes.OFFSET, cause)
        if offset + nbytes > room:
            cause = f"tensor {_shown(name)} ends at byte {base + offset + nbytes}"
            raise cursor.error(codes.TRUNCATED, f"{cause}, the file at {cursor.size}")
        tensors[name] = GgufTensor(name, kind, shape, base + offset, nbytes)
    last: GgufTensor | None = None
    for tensor in sorted(tensors.values(), key=lambda item: (item.start, item.stop)):
        if last is not None and tensor.nbytes and tensor.start < last.stop:
            cause = f"tensors {_shown(last.name)} and {_shown(tensor.name)} share bytes"
            raise cursor.error(codes.OVERLAP, cause)
        if tensor.nbytes:
            last = tensor
    return tensors


def open_split(path: Path) -> list[GgufFile]:
    """The file, or all files of the split that it is one of, in order.

    Raises:
        QuantmillError: a file is missing or damaged, or they don't belong together.
    """
    first = GgufFile.open(path)
    total = first.metadata.get("split.count", 1)
    if not isinstance(total, int) or total <= 1:
        return [first]

    def refuse(cause: str) -> NoReturn:
        fix = "put all files of the split into one folder, under their own names"
        raise QuantmillError(codes.SPLIT(path.name, cause, fix))

    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != total:
        refuse(f"it is one of {total} files, and its name is not NAME-00001-of-{total:05}.gguf")
    files: list[GgufFile] = []
    names: set[str] = set()
    for index in range(total):
        part = path.with_name(f"{match[1]}-{index + 1:05}-of-{total:05}.gguf")
        if not part.is_file():
            refuse(f"{part.name} is missing")
        file = first if part.name == path.name else GgufFile.open(part)
        number = file.metadata.get("split.no")
        if number != index or file.metadata.get("split.count") != total:
            refuse(f"{part.name} says it is number {number!r:.20} (from 0)")
        if file.big_endian != first.big_endian:
            refuse(f"{part.name} has another byte order")
        twice = names & set(file.tensors)
        if twice:
            refuse(f"tensor {_shown(min(twice))} is in two of the files")
        names |= set(file.tensors)
        files.append(file)
    stated = files[0].metadata.get("split.tensors.count", len(names))
    if stated != len(names):
        refuse(f"it states {stated!r:.20} tensors, the files hold {len(names)}")
    return files
