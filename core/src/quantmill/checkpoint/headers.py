"""Headers of safetensors files: what a checkpoint holds, without reading a weight.

Nothing of a file is believed before it is checked: every length is bounded by the size of the
file before it is used, and every contradiction is a finding. This module does not import PyTorch.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import BITS, bytes_of
from quantmill.findings import FindingCode, Findings, QuantmillError

if TYPE_CHECKING:
    from quantmill.checkpoint.source import Source

__all__ = [
    "MAX_HEADER_BYTES",
    "CheckpointHeaders",
    "TensorHeader",
    "read_safetensors_header",
]

MAX_HEADER_BYTES: Final = 100_000_000
"""The longest header the safetensors format allows, in bytes."""
_MAX_ELEMENTS: Final = 2**63 - 1
_MAX_DIMS: Final = 64
_DAMAGED: Final = "the file is damaged or not a safetensors file: get it again from its source"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies and what it is.

    ``dtype`` is the safetensors code (``"BF16"``), ``shape`` is in elements, ``file`` is relative
    to the source, ``start`` and ``stop`` are absolute byte offsets in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements; those narrower than a byte are packed."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class CheckpointHeaders:
    """All a checkpoint says of itself before a weight is read."""

    tensors: Mapping[str, TensorHeader]
    """By name, in the order of files and of offsets in each."""
    metadata: Mapping[str, str]
    """``__metadata__`` of the files, joined; the first file that has a key wins."""
    files: Mapping[str, int]
    """Size in bytes of every weight file that is read."""
    config: dict[str, Any]
    """``config.json``, empty where there is none."""
    generation_config: dict[str, Any] | None
    source: Source
    findings: Findings = field(default_factory=Findings)
    """Warnings; errors were raised."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def place(self, names: Iterable[str]) -> tuple[str, int]:
        """File and offset of the first of these tensors that is there, to sort by; ``("", -1)``
        where none is."""
        found = (self.tensors[name] for name in names if name in self.tensors)
        return next(((header.file, header.start) for header in found), ("", -1))


class _Duplicate(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key)
            seen.add(key)
    return result


def _fail(code: FindingCode, file: str, cause: str, fix: str = _DAMAGED, **data: Any) -> NoReturn:
    raise QuantmillError(code(file, cause, fix, file=file, **data))


# Bounded in depth too: repr() of what a parser just accepted may exceed the recursion limit.
_REPR: Final = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 3, 8, 8
_REPR.maxstring, _REPR.maxlong, _REPR.maxother = 120, 40, 40


def _short(value: object, limit: int = 160) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell and no file name or header can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        _fail(codes.HEADER_JSON, file, f"the header starts with {raw[:8]!r} instead of '{{'")
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _Duplicate as error:
        _fail(codes.HEADER_DUPLICATE, file, f"the header has the key {_short(error.key)} twice")
    except RecursionError:
        _fail(codes.HEADER_JSON, file, "the header is nested absurdly deep")
    except ValueError as error:  # Malformed JSON, malformed UTF-8, an integer of 5000 digits.
        _fail(codes.HEADER_JSON, file, f"the header is not JSON: {str(error)[:160]}")
    if not isinstance(parsed, dict):
        _fail(codes.HEADER_JSON, file, "the header is not a JSON object")
    return parsed


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _metadata(raw: object, file: str) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        _fail(codes.HEADER_METADATA, file, "__metadata__ is not a table of strings to strings")
    if not all(_is_unicode(key) and _is_unicode(value) for key, value in raw.items()):
        _fail(codes.HEADER_METADATA, file, "__metadata__ holds what is not Unicode text")
    return raw


def _shape(name: str, raw: object, file: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) > _MAX_DIMS or not all(map(_is_int, raw)):
        _fail(codes.HEADER_SHAPE, file, f"tensor {_short(name)} has the shape {_short(raw)}")
    product = 1
    for extent in raw:
        if extent < 0 or extent > _MAX_ELEMENTS:
            _fail(
                codes.HEADER_SHAPE, file, f"tensor {_short(name)} has the extent {_short(extent)}"
            )
        product *= max(extent, 1)
    if product > _MAX_ELEMENTS:
        _fail(codes.HEADER_SHAPE, file, f"tensor {_short(name)} has {_short(raw)}: over 2**63")
    return tuple(raw)


def _entry(name: str, raw: object, file: str, base: int, size: int) -> TensorHeader:
    """Check one entry by itself. ``base`` is the offset of the data, ``size`` that of the file."""
    shown = name if name.isascii() else _short(name)
    if not name.isascii() and not _is_unicode(name):
        _fail(codes.HEADER_ENTRY, file, f"the name {shown} is not Unicode text")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        cause = f"tensor {shown} needs exactly dtype, shape and data_offsets"
        _fail(codes.HEADER_ENTRY, file, f"{cause}, not {_short(raw)}", tensor=name)
    dtype, offsets = raw["dtype"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        fix = f"known dtypes are {', '.join(BITS)}; a newer quantmill may know more"
        cause = f"tensor {shown} has the dtype {_short(dtype)}"
        _fail(codes.HEADER_DTYPE, file, cause, fix, tensor=name)
    shape = _shape(name, raw["shape"], file)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_int, offsets)):
        cause = f"tensor {shown} has data_offsets {_short(offsets)}, not two integers"
        _fail(codes.HEADER_OFFSETS, file, cause, tensor=name)
    start, stop = offsets
    if not 0 <= start <= stop or stop > _MAX_ELEMENTS:
        cause = f"tensor {shown} has data_offsets {_short(offsets)}"
        _fail(codes.HEADER_OFFSETS, file, cause, tensor=name)
    need = bytes_of(dtype, shape)
    if need != stop - start:
        cause = f"tensor {shown} ({dtype}, {list(shape)}) takes {need} bytes, not {stop - start}"
        if need is None:
            cause = f"tensor {shown} ({dtype}, {list(shape)}) fills no whole number of bytes"
        _fail(codes.HEADER_OFFSETS, file, cause, tensor=name)
    if base + stop > size:
        cause = f"tensor {shown} ends at byte {base + stop}, the file at {size}"
        fix = "the file is truncated: download or copy it again"
        _fail(codes.TRUNCATED, file, cause, fix, tensor=name, needed=base + stop, size=size)
    return TensorHeader(name, dtype, shape, file, base + start, base + stop)


def read_safetensors_header(
    read: Callable[[int, int], bytes], size: int, file: str
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Args:
        read: gives the bytes [start, stop) of the file, or raises.
        size: of the whole file in bytes.
        file: its name relative to the source, for headers and messages.

    Returns:
        The tensors in the order of their offsets, and the file's ``__metadata__``.

    Raises:
        QuantmillError: ``QM-CKPT-020`` to ``028``, the header or the length of the file is wrong.
    """
    again = "the file is truncated: download or copy it again"
    if size < 8:
        _fail(codes.TRUNCATED, file, f"the file has {size} bytes, not even a header", again)
    length = int.from_bytes(_exactly(read, 0, 8, file), "little")
    if length > MAX_HEADER_BYTES:
        cause = f"the header claims {length} bytes; the format allows {MAX_HEADER_BYTES}"
        _fail(codes.HEADER_LENGTH, file, cause, length=length)
    if length < 2:
        _fail(codes.HEADER_LENGTH, file, f"the header claims {length} bytes", length=length)
    base = 8 + length
    if base > size:
        cause = f"the header claims {length} bytes, the whole file has {size}"
        _fail(codes.TRUNCATED, file, cause, again, needed=base, size=size)
    parsed = _parse(_exactly(read, 8, base, file), file)
    metadata = _metadata(parsed.pop("__metadata__", {}), file)
    entries = [_entry(name, raw, file, base, size) for name, raw in parsed.items()]
    entries.sort(key=lambda item: (item.start, item.stop))
    position = base
    for item in entries:
        if item.start != position:
            kind = "overlaps" if item.start < position else "leaves a hole after"
            cause = (
                f"tensor {_short(item.name)} at byte {item.start} {kind} what ends at {position}"
            )
            _fail(codes.HEADER_OFFSETS, file, cause, tensor=item.name)
        position = item.stop
    if position != size:
        cause = f"the tensors end at byte {position}, the file at {size}"
        _fail(codes.HEADER_OFFSETS, file, cause)
    return {item.name: item for item in entries}, metadata


def _exactly(read: Callable[[int, int], bytes], start: int, stop: int, file: str) -> bytes:
    raw = read(start, stop)
    if len(raw) != stop - start:
        cause = f"wanted the bytes {start} to {stop}, got {len(raw)}"
        _fail(codes.TRUNCATED, file, cause, "the file is truncated: download or copy it again")
    return raw
