"""GGUF files as a source of the core: headers under the names of transformers, and their reader.

A quantized matrix appears as one uint8 tensor ``NAME.weight.TYPE`` ``[rows, row bytes]``, in the
row order of transformers: rows are whole blocks, so reordering them loses nothing. What has no
packed module (embeddings, norms) appears as float32 and is decoded when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.checkpoint.dtypes import torch_dtype
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.findings import Findings, QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.container import GgufFile, GgufTensor, open_split
from quantmill_gguf.models import describe, shown
from quantmill_gguf.types.sizes import PLAIN

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GgufReader", "GgufSource", "headers_of", "read"]

_ROWS_BYTES: Final = 4 << 20
"""Bytes that are decoded at a time."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor: where it lies, and what is done to it."""

    file: GgufFile
    tensor: GgufTensor
    heads: int
    """Heads whose rows are interleaved in the file; 0 for none."""
    packed: bool
    """Given as bytes, not decoded."""


class GgufSource:
    """One GGUF file, or the files of a split, as a :class:`quantmill.checkpoint.source.Source`."""

    def __init__(self, path: Path, files: list[GgufFile]) -> None:
        self.path = path
        self.files = files
        self.entries: dict[str, _Entry] = {}
        """By the name that the headers have."""

    def reader(self, headers: CheckpointHeaders) -> GgufReader:
        """What reads its tensors."""
        return GgufReader(headers, self.entries)

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
    """Reads like :class:`quantmill.checkpoint.reader.TensorReader`, out of the mapped files."""

    def __init__(self, headers: CheckpointHeaders, entries: dict[str, _Entry]) -> None:
        self.headers = headers
        self._entries = entries

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """The files stay mapped as long as a tensor lies in them."""

    def tensor(self, name: str) -> Tensor:
        """The tensor that the headers describe, in memory of its own."""
        import torch

        header = self.headers.tensors[name]
        out = torch.empty(header.shape, dtype=torch_dtype(header.dtype, name))
        self.read_into(header, out)
        return out

    def mapped(self, name: str) -> Tensor:
        """The same; pages of the file where it needs neither decoding nor reordering: writes
        do not reach the file."""
        entry = self._entries[name]
        if entry.packed and not entry.heads and not entry.file.big_endian:
            return _bytes(entry, 0, entry.tensor.shape[0])
        return self.tensor(name)

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Fill a contiguous CPU tensor from element ``start_elem`` on."""
        entry = self._entries[header.name]
        shape = tuple(header.shape)
        width = shape[-1] if shape else 1
        total = out.numel()
        if start_elem < 0 or start_elem + total > header.numel:
            raise ValueError(f"{header.name}: the tensor does not have that many elements")
        flat, done = out.view(-1), 0
        while done < total:
            row, skip = divmod(start_elem + done, width)
            rows = max(1, _ROWS_BYTES // (4 * max(1, width)))
            last = min(row + rows, -(-(start_elem + total) // width))
            values = _values(entry, row, last, torch_dtype(header.dtype)).reshape(-1)
            count = min(values.numel() - skip, total - done)
            flat[done : done + count] = values[skip : skip + count]
            done += count

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, rows)``."""
        header = self.headers.tensors[name]
        if not header.shape:
            raise ValueError(f"{name} is a scalar and has no rows")
        if len(header.shape) != 2:
            whole = self.tensor(name)
            for start in range(0, header.shape[0], max(1, rows)):
                yield start, whole[start : start + rows]
            return
        for start in range(0, header.shape[0], max(1, rows)):
            stop = min(header.shape[0], start + max(1, rows))
            yield start, _values(self._entries[name], start, stop, torch_dtype(header.dtype))


def _bytes(entry: _Entry, first: int, last: int) -> Tensor:
    """Rows of a tensor as they lie in the file: uint8 ``[rows, row bytes]``, no copy."""
    import torch

    tensor = entry.tensor
    columns = tensor.shape[-1] if tensor.shape else 1
    width = tensor.type.row_bytes(columns)
    if (last - first) * width == 0:
        return torch.empty(last - first, width, dtype=torch.uint8)
    flat = torch.frombuffer(
        entry.file.data,
        dtype=torch.uint8,
        count=(last - first) * width,
        offset=tensor.start + first * width,
    )
    return flat.view(last - first, width)


def _values(entry: _Entry, first: int, last: int, dtype: Any) -> Tensor:
    """Rows ``[rows, ...]`` as the headers describe them."""
    import torch

    from quantmill_gguf.byteorder import swapped
    from quantmill_gguf.types import TYPES
    from quantmill_gguf.types.plain import PlainType

    tensor = entry.tensor
    if entry.heads:
        raw = _reordered(entry, first, last)
    else:
        raw = _bytes(entry, first, last)
    if entry.file.big_endian:
        raw = swapped(raw, tensor.type)
    if entry.packed:
        return raw
    kind = TYPES.get(tensor.type.name)
    if kind is None:
        cause = f"{tensor.name} is {tensor.type.name}, whose decoder is not written yet"
        raise QuantmillError(
            codes.UNSUPPORTED(entry.file.path.name, cause, "quantize the model to another type")
        )
    if isinstance(kind, PlainType):
        return kind.values(raw).to(dtype)
    return torch.empty(0, dtype=dtype) if raw.numel() == 0 else kind.decode(raw).to(dtype)


def _reordered(entry: _Entry, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` in the order of transformers.

    Of each head, llama.cpp has rows ``0, n/2, 1, n/2 + 1, ...`` for its rotary embedding. A
    vector (a bias) is one row here, and its elements are reordered.
    """
    import torch

    from quantmill_gguf.types.plain import DTYPES

    shape = entry.tensor.shape
    count = shape[0]
    index = torch.arange(count).view(entry.heads, count // entry.heads // 2, 2)
    order = index.transpose(1, 2).reshape(-1)
    if len(shape) == 1:
        width = DTYPES[entry.tensor.type.name].itemsize
        whole = _bytes(entry, 0, 1).view(count, width)
        return whole[order].view(1, -1)
    rows = order[first:last]
    low, high = int(rows.min()), int(rows.max()) + 1
    return _bytes(entry, low, high)[rows - low]


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
    model = describe(metadata, tensors, path.name, _rope_factors(owners))
    source = GgufSource(path, files)
    headers: dict[str, TensorHeader] = {}
    for name, renamed in model.names.items():
        tensor, file = tensors[name], owners[name]
        packed = _is_packed(renamed, tensor)
        shown_name = f"{renamed}.{tensor.type.name}" if packed else renamed
        shape = tensor.shape
        dtype = tensor.type.plain or "F32"
        if packed:
            dtype, shape = "U8", (shape[0], tensor.type.row_bytes(shape[1]))
        headers[shown_name] = TensorHeader(
            shown_name, dtype, shape, file.path.name, tensor.start, tensor.stop
        )
        heads = model.heads.get(name, 0)
        source.entries[shown_name] = _Entry(file, tensor, heads, packed)
    quantized = any(entry.packed for entry in source.entries.values())
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


def _rope_factors(owners: dict[str, GgufFile]) -> bytes | None:
    file = owners.get("rope_freqs.weight")
    if file is None:
        return None
    tensor = file.tensors["rope_freqs.weight"]
    raw = bytes(file.data[tensor.start : tensor.stop])
    if tensor.type.name != "F32" or not raw:
        raise QuantmillError(
            codes.UNSUPPORTED(
                file.path.name, f"rope_freqs.weight is {tensor.type.name}, not F32", "get it again"
            )
        )
    if file.big_endian:
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    return raw


def _is_packed(name: str, tensor: GgufTensor) -> bool:
    embedding = name in ("model.embed_tokens.weight", "token_embd.weight")
    if tensor.type.name in PLAIN or len(tensor.shape) != 2 or embedding:
        return False
    return name.endswith(".weight")


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
