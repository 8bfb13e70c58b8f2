"""GGUF files as a source of the core: headers under the names of transformers, and their reader.

A quantized matrix appears as one uint8 tensor ``NAME.weight.TYPE`` ``[rows, row bytes]``, in the
row order of transformers: rows are whole blocks, so reordering them loses nothing. What has no
packed module (embeddings, norms) appears as float32 and is decoded when it is read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.checkpoint.dtypes import torch_dtype
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.findings import Findings, QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.container import GgufFile, GgufTensor, open_split
from quantmill_gguf.models import TABLES, Parameter, describe, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GgufReader", "GgufSource", "headers_of", "read"]

_ROWS_BYTES: Final = 4 << 20
"""Bytes that are decoded at a time."""
_PAGES_BYTES: Final = 4 << 20
"""Bytes of the file that are looked at before their pages are given back."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor of the headers, and where it lies."""

    file: GgufFile
    tensor: GgufTensor
    parameter: Parameter | None = None
    """None for a tensor that is none of the model's: it is given as it is."""
    packed: bool = False
    """Given as bytes, not decoded."""

    @property
    def plain(self) -> bool:
        """Its elements lie in the file in their order."""
        return self.parameter is None or self.parameter.entry.plain

    @property
    def rows(self) -> tuple[int, int]:
        """First and last row of it in the tensor; a vector is one."""
        part = None if self.parameter is None else self.parameter.entry.part
        shape = self.tensor.shape
        if part is None:
            return 0, math.prod(shape[:-1])
        each = math.prod(shape[1:-1])
        return part * each, (part + 1) * each


class GgufSource:
    """One GGUF file, or the files of a split, as a :class:`quantmill.checkpoint.source.Source`."""

    def __init__(self, path: Path, files: list[GgufFile]) -> None:
        self.path = path
        self.files = files
        self.items: dict[str, _Item] = {}
        """By the name that the headers have."""

    def reader(self, headers: CheckpointHeaders) -> GgufReader:
        """What reads its tensors."""
        return GgufReader(headers, self.items)

    def names(self) -> list[str]:
        """Names of the files."""
        return [item.path.name for item in self.files]

    def exists(self, name: str) -> bool:
        """Whether it is one of the files: nothing beside them belongs to the model."""
        return name in self.names()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._file(name).size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``; fewer where the file ends before."""
        return bytes(self._file(name).data[start:stop])

    def local_path(self, name: str) -> Path:
        """The file itself."""
        return self._file(name).path

    def describe(self) -> str:
        """The path as the user gave it."""
        return str(self.path)

    def identity(self) -> str:
        """Changes when a file does."""
        parts = [f"{f.path.name}:{f.size}:{f.path.stat().st_mtime_ns}" for f in self.files]
        return f"{self.path.resolve()}|" + "|".join(parts)

    def _file(self, name: str) -> GgufFile:
        for item in self.files:
            if item.path.name == name:
                return item
        raise QuantmillError(
            codes.UNREADABLE(name, f"{self.path.name} has no file of this name", "check it")
        )


class GgufReader:
    """Reads like :class:`quantmill.checkpoint.reader.TensorReader`, out of maps of its own.

    Pages that were looked at are given back to the system as reading goes on: what a mapped
    tensor needs later comes from the file again.
    """

    def __init__(self, headers: CheckpointHeaders, items: dict[str, _Item]) -> None:
        self.headers = headers
        self._items = items
        self._maps: dict[Path, mmap.mmap] = {}
        self._touched = 0

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """The files stay mapped as long as a tensor lies in them."""
        self._release()
        self._maps = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor that the headers describe, in memory of its own."""
        import torch

        header, item = self.headers.tensors[name], self._items[name]
        if item.plain:
            out = torch.empty(header.shape, dtype=torch_dtype(header.dtype, name))
            self.read_into(header, out)
            return out
        return self._made(item, torch_dtype(header.dtype, name))

    def mapped(self, name: str) -> Tensor:
        """The same; pages of the file where it needs neither decoding nor reordering: writes
        do not reach the file."""
        header, item = self.headers.tensors[name], self._items[name]
        whole = item.packed or bool(item.tensor.type.plain)
        dtype = torch_dtype(header.dtype, name)
        aligned = header.start % dtype.itemsize == 0
        if item.plain and whole and aligned and not item.file.big_endian:
            self._touch(header.nbytes)
            raw = self._bytes(item, *item.rows)
            return raw.reshape(-1).view(dtype).reshape(header.shape)
        return self.tensor(name)

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Fill a contiguous CPU tensor from element ``start_elem`` on."""
        item = self._items[header.name]
        total = out.numel()
        if start_elem < 0 or start_elem + total > header.numel:
            raise ValueError(f"{header.name}: the tensor does not have that many elements")
        flat, done = out.view(-1), 0
        dtype = torch_dtype(header.dtype)
        if not item.plain:
            values = self._made(item, dtype).reshape(-1)
            flat.copy_(values[start_elem : start_elem + total])
            return
        width = header.shape[-1] if header.shape else 1
        base = item.rows[0]
        while done < total:
            row, skip = divmod(start_elem + done, width)
            rows = max(1, _ROWS_BYTES // (4 * max(1, width)))
            last = min(row + rows, -(-(start_elem + total) // width))
            values = self._values(item, base + row, base + last, dtype).reshape(-1)
            count = min(values.numel() - skip, total - done)
            flat[done : done + count] = values[skip : skip + count]
            done += count

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, rows)``."""
        header, item = self.headers.tensors[name], self._items[name]
        if not header.shape:
            raise ValueError(f"{name} is a scalar and has no rows")
        rows = max(1, rows)
        if len(header.shape) != 2 or not item.plain:
            whole = self.tensor(name)
            for start in range(0, header.shape[0], rows):
                yield start, whole[start : start + rows]
            return
        dtype, base = torch_dtype(header.dtype), item.rows[0]
        for start in range(0, header.shape[0], rows):
            stop = min(header.shape[0], start + rows)
            yield start, self._values(item, base + start, base + stop, dtype)

    # -- from the files ------------------------------------------------------------------------

    def _map(self, file: GgufFile) -> Any:
        if not isinstance(file.data, mmap.mmap):
            return file.data
        if file.path not in self._maps:
            with file.path.open("rb") as stream:
                # Private pages: who writes to a tensor in them changes no file.
                made = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(made) < file.size:
                cause = f"it has {len(made)} bytes, and had {file.size} when it was opened"
                fix = "leave the file alone while it is read"
                raise QuantmillError(codes.TRUNCATED(file.path.name, cause, fix))
            self._maps[file.path] = made
        return self._maps[file.path]

    def _touch(self, nbytes: int) -> None:
        """Give pages back when many were looked at."""
        self._touched += nbytes
        if self._touched > _PAGES_BYTES:
            self._release()
            self._touched = nbytes

    def _release(self) -> None:
        for made in self._maps.values():
            made.madvise(mmap.MADV_DONTNEED)

    def _bytes(self, item: _Item, first: int, last: int) -> Tensor:
        """Rows of a tensor as they lie in the file: uint8 ``[rows, row bytes]``, no copy."""
        import torch

        tensor = item.tensor
        columns = tensor.shape[-1] if tensor.shape else 1
        width = tensor.type.row_bytes(columns)
        if (last - first) * width == 0:
            return torch.empty(last - first, width, dtype=torch.uint8)
        flat = torch.frombuffer(
            self._map(item.file),
            dtype=torch.uint8,
            count=(last - first) * width,
            offset=tensor.start + first * width,
        )
        return flat.view(last - first, width)

    def _rows(self, item: _Item, first: int, last: int) -> Tensor:
        """The same in little-endian order."""
        from quantmill_gguf.byteorder import swapped

        raw = self._bytes(item, first, last)
        self._touch(raw.numel())
        return swapped(raw, item.tensor.type) if item.file.big_endian else raw

    def _values(self, item: _Item, first: int, last: int, dtype: Any) -> Tensor:
        """Rows ``[rows, columns]`` of a tensor, decoded unless they are given as bytes."""
        import torch

        from quantmill_gguf.types import TYPES
        from quantmill_gguf.types.plain import PlainType

        raw = self._rows(item, first, last)
        if item.packed:
            return raw
        tensor = item.tensor
        kind = TYPES.get(tensor.type.name)
        if kind is None:
            cause = f"{tensor.name} is {tensor.type.name}, whose decoder is not written yet"
            fix = "quantize the model to another type"
            raise QuantmillError(codes.UNSUPPORTED(item.file.path.name, cause, fix))
        if isinstance(kind, PlainType):
            return kind.values(raw).to(dtype)
        return torch.empty(0, dtype=dtype) if raw.numel() == 0 else kind.decode(raw).to(dtype)

    def _made(self, item: _Item, dtype: Any) -> Tensor:
        """A parameter whose tensor is moved."""
        assert item.parameter is not None
        values = self._values(item, *item.rows, dtype)
        shape = item.tensor.shape if item.parameter.entry.part is None else item.tensor.shape[1:]
        whole = values.reshape(*shape[:-1], values.shape[-1] if shape else 1)
        move = item.parameter.entry.move
        return (move.read_rows(whole) if item.packed else move.read(whole)).contiguous()


def read(path: Path) -> CheckpointHeaders:
    """The headers of a GGUF file or split, for :class:`quantmill.registrations.Container`.

    Raises:
        QuantmillError: ``QM-GGUF-001`` to ``024``.
    """
    return headers_of(open_split(path), path)


def headers_of(files: list[GgufFile], path: Path) -> CheckpointHeaders:
    """The headers of files that were opened from ``path``.

    Raises:
        QuantmillError: ``QM-GGUF-020`` to ``024``.
    """
    owners = {name: item for item in files for name in item.tensors}
    tensors = {name: item.tensors[name] for name, item in owners.items()}
    metadata = files[0].metadata
    tables: dict[str, bytes] = {
        name: _table(owners[name], name) for name in TABLES if name in owners
    }
    model = describe(metadata, tensors, path.name, tables)
    source = GgufSource(path, files)
    headers: dict[str, TensorHeader] = {}
    for name, found in model.parameters.items():
        tensor, file = tensors[found.entry.tensor], owners[found.entry.tensor]
        item = _Item(file, tensor, found, found.packed)
        dtype, shape, shown_name = found.type_name, found.shape, name
        if found.packed:
            shown_name = f"{name}.{found.type_name}"
            dtype, shape = "U8", (*shape[:-1], tensor.type.row_bytes(shape[-1]))
        width = tensor.type.row_bytes(tensor.shape[-1] if tensor.shape else 1)
        first, last = item.rows
        headers[shown_name] = TensorHeader(
            shown_name,
            dtype,
            shape,
            file.path.name,
            tensor.start + first * width,
            tensor.start + last * width,
        )
        source.items[shown_name] = item
    for name in model.rest:
        _add_as_it_is(name, tensors[name], owners[name], headers, source)
    quantized = any(item.packed for item in source.items.values())
    if quantized or not model.config:
        model.config["quantization_config"] = _summary(files, tensors)
    return CheckpointHeaders(
        headers,
        {key: str(shown(value)) for key, value in metadata.items()},
        {item.path.name: item.size for item in files},
        model.config,
        None,
        source,
        Findings(model.findings),
    )


def _add_as_it_is(
    name: str,
    tensor: GgufTensor,
    file: GgufFile,
    headers: dict[str, TensorHeader],
    source: GgufSource,
) -> None:
    """A tensor that no parameter is made of, under its own name."""
    packed = not tensor.type.plain and len(tensor.shape) > 1
    shape, dtype = tensor.shape, tensor.type.plain or "F32"
    if packed:
        shape, dtype = (*shape[:-1], tensor.type.row_bytes(shape[-1])), "U8"
        name = f"{name}.{tensor.type.name}"
    headers[name] = TensorHeader(
        name, dtype, shape, file.path.name, tensor.start, tensor.start + tensor.nbytes
    )
    source.items[name] = _Item(file, tensor, None, packed)


def _table(file: GgufFile, name: str) -> bytes:
    """The little-endian float32 of a small tensor."""
    tensor = file.tensors[name]
    if tensor.type.name != "F32" or not 0 < tensor.nbytes <= 1 << 20:
        cause = f"{name} is {tensor.type.name} of {tensor.nbytes} bytes, not a small F32"
        raise QuantmillError(codes.UNSUPPORTED(file.path.name, cause, "get it again"))
    raw = bytes(file.data[tensor.start : tensor.stop])
    if file.big_endian:
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    return raw


def _summary(files: list[GgufFile], tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """What :class:`quantmill_gguf.config.GgufConfig` says of a file."""
    types: dict[str, int] = {}
    for tensor in tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    elements = sum(tensor.numel for tensor in tensors.values())
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "quant_method": "gguf",
        "version": files[0].version,
        "byte_order": "big" if files[0].big_endian else "little",
        "types": dict(sorted(types.items())),
        "bits_per_weight": round(8 * nbytes / max(1, elements), 3),
        # Keys without a dot would be taken for ours.
        **{k: shown(value) for k, value in files[0].metadata.items() if "." in k},
    }
