"""A quantized checkpoint seen as a float one: its weights are dequantized when they are read.

Everything that takes a float checkpoint takes the view: planning, quantizers, calibration.
Nothing is kept: a weight is decoded and dequantized by blocks of rows each time it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from quantmill.checkpoint.dtypes import code_of, torch_dtype
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.forms import Form, float_rows
from quantmill.stages.quantize import (
    cast,
    codec_of,
    decode_stored,
    member_headers,
    open_reader,
)

if TYPE_CHECKING:
    from quantmill.checkpoint.reader import TensorReader
    from quantmill.job import Job, Selection
    from quantmill.targeting.types import Target

__all__ = ["ROWS", "Stored", "float_view", "stored_targets"]

ROWS: Final = 1 << 21
"""Weights that are dequantized at a time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A target that a checkpoint holds quantized."""

    target: Target
    selection: Selection
    prefix: str
    """Its module's name in the checkpoint."""
    nbytes: int
    """Of its tensors there."""

    @property
    def weight(self) -> str:
        """Name of the float weight that it stands for."""
        return f"{self.prefix}.{self.target.parameter}"


def stored_targets(job: Job) -> dict[str, Stored]:
    """The quantized targets of a planned job, by the name of their weight in the checkpoint."""
    assert job.plan is not None and job.architecture is not None
    found = {}
    if not job.prequantized:
        return {}
    for entry in job.plan.modules:
        if entry.action != "quantize" or entry.target is None or entry.method is None:
            continue
        selection = job.selections[entry.method]
        prefix = job.architecture.module_prefix(entry.target.module)
        members = member_headers(prefix, codec_of(job, selection), job.headers)
        nbytes = sum(item.nbytes for item in members.values())
        item = Stored(entry.target, selection, prefix, nbytes)
        found[item.weight] = item
    return found


def float_view(
    job: Job,
    dtype: torch.dtype,
    others: Mapping[str, torch.dtype] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> CheckpointHeaders:
    """The headers of a planned job's checkpoint with float weights of ``dtype``, or by name of
    ``others``, in the place of quantized ones. Its source gives the reader, and has the files
    ``beside`` it."""
    stored = stored_targets(job)
    tensors = dict(job.headers.tensors)
    for name, item in stored.items():
        kind = (others or {}).get(name, dtype)
        members = member_headers(item.prefix, codec_of(job, item.selection), job.headers)
        first = min(members.values(), key=lambda header: (header.file, header.start))
        for header in members.values():
            tensors.pop(header.name, None)
        shape = tuple(item.target.module.parameters[item.target.parameter].shape)
        size = item.target.weights * kind.itemsize
        # Where the quantized one lies: work goes in the order of the files.
        start = first.start
        tensors[name] = TensorHeader(name, code_of(kind), shape, first.file, start, start + size)
    config = {k: v for k, v in job.headers.config.items() if k != "quantization_config"}
    source: Any = _View(job, stored, beside or {})
    return dataclasses.replace(job.headers, tensors=tensors, config=config, source=source)


class _View:
    """The checkpoint's own source, but for its reader and its identity."""

    def __init__(self, job: Job, stored: dict[str, Stored], beside: Mapping[str, bytes]) -> None:
        self._job = job
        self._stored = stored
        self._beside = beside
        self._source = job.headers.source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return name in self._beside or self._source.exists(name)

    def size(self, name: str) -> int:
        """Bytes of an existing file."""
        return len(self._beside[name]) if name in self._beside else self._source.size(name)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an existing file."""
        if name in self._beside:
            return self._beside[name][start:stop]
        return self._source.read(name, start, stop)

    def identity(self) -> str:
        """Another text than that of the quantized checkpoint."""
        return f"{self._source.identity()}|dequantized"

    def reader(self, headers: CheckpointHeaders) -> _ViewReader:
        """What reads floats."""
        return _ViewReader(headers, self._job, self._stored)


class _ViewReader:
    """Reads like :class:`~quantmill.checkpoint.reader.TensorReader`."""

    def __init__(self, headers: CheckpointHeaders, job: Job, stored: dict[str, Stored]) -> None:
        self.headers = headers
        self._job = job
        self._stored = stored
        self._inner: TensorReader = open_reader(job.headers)

    def __enter__(self) -> _ViewReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def close(self) -> None:
        """Close the files."""
        self._inner.close()

    def form(self, name: str) -> Form:
        """The stored form of a quantized weight."""
        item = self._stored[name]
        return decode_stored(self._job, self._inner, item.target, item.selection)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in memory of its own."""
        if name not in self._stored:
            return self._inner.tensor(name)
        header = self.headers.tensors[name]
        out = torch.empty(tuple(header.shape), dtype=torch_dtype(header.dtype, name))
        rows = self._rows(name)
        if out.dim() != 2 or self._transposed(name):
            ((_, whole),) = rows
            return out.copy_(self._cast(name, whole).reshape(out.shape))
        for start, block in rows:
            out[start : start + block.shape[0]] = self._cast(name, block)
        return out

    def mapped(self, name: str) -> Tensor:
        """As :meth:`tensor` for a quantized one."""
        return self.tensor(name) if name in self._stored else self._inner.mapped(name)

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Fill ``out`` from element ``start_elem`` on."""
        if header.name not in self._stored:
            self._inner.read_into(header, out, start_elem)
            return
        flat = self.tensor(header.name).reshape(-1)[start_elem : start_elem + out.numel()]
        out.copy_(flat.reshape(out.shape))

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, block)``, as they come out of the form."""
        if name not in self._stored:
            yield from self._inner.row_blocks(name, rows)
            return
        for start, block in self._rows(name, rows):
            for offset in range(0, block.shape[0], rows):
                yield start + offset, self._cast(name, block[offset : offset + rows])

    def _transposed(self, name: str) -> bool:
        """The parameter is the transpose of the form."""
        target = self._stored[name].target
        return target.transposed and target.experts is None

    def _rows(self, name: str, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        form = self.form(name)
        if self._transposed(name):
            target = self._stored[name].target
            whole = form.dequantize(torch.float32)
            as_matrix = tuple(whole.shape) == (target.out_features, target.in_features)
            yield 0, whole.t().contiguous() if as_matrix else whole
            return
        width = max(1, form.shape[-1])
        yield from float_rows(form, rows or max(1, ROWS // width))

    def _cast(self, name: str, values: Tensor) -> Tensor:
        return cast(values, torch_dtype(self.headers.tensors[name].dtype, name), name)
