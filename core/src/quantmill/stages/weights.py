"""Float weights on their way from a checkpoint: by row blocks, onto the device that works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import block_bytes
from quantmill.checkpoint.reader import TensorReader, torch_dtype
from quantmill.targeting.types import Target

__all__ = ["StreamedWeight", "moved", "on_device"]


class StreamedWeight:
    """A :class:`quantmill.backend.WeightSource` over a checkpoint."""

    def __init__(
        self,
        reader: TensorReader,
        target: Target,
        architecture: Any,
        device: torch.device,
        cast: torch.dtype | None = None,
    ) -> None:
        self._reader = reader
        self._target = target
        self._parameter = target.module.parameters[target.parameter]
        self._architecture = architecture
        self._device = device
        self._cast = cast
        self.name = self._parameter.name
        experts = (target.experts,) if target.experts else ()
        self.shape: tuple[int, ...] = (*experts, target.out_features, target.in_features)
        self.dtype = cast or torch_dtype(self._parameter.dtype)
        self.multiple = 0
        """Of which :meth:`row_blocks` was last asked for; 0 where nobody did."""

    @property
    def _direct(self) -> bool:
        return not self._target.transposed and not self._architecture.converted(self._parameter)

    def tensor(self) -> Tensor:
        weight: Tensor = self._architecture.assemble(self._parameter, self._reader)
        if self._target.transposed:
            weight = weight.transpose(-1, -2)
        return weight.to(device=self._device, dtype=self.dtype).contiguous()

    def _count(self, multiple: int) -> int:
        """Rows of a block."""
        stored = torch_dtype(self._parameter.dtype).itemsize
        wanted = max(1, block_bytes(self._device) // max(1, self.shape[-1] * stored))
        return max(multiple, wanted // multiple * multiple)

    @property
    def _by_rows(self) -> bool:
        """Whether blocks are read one by one."""
        return self._direct and len(self.shape) == 2

    def begin(self, multiple: int) -> None:
        """Read ahead what ``row_blocks(multiple)`` begins with."""
        if self._by_rows and type(self._reader) is TensorReader:
            self._reader.begin(
                self._parameter.sources[0], min(self._count(multiple), self.shape[0])
            )

    def row_blocks(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        self.multiple, count = multiple, self._count(multiple)
        if not self._by_rows:
            weight = self.tensor().reshape(-1, self.shape[-1])
            for start in range(0, weight.shape[0], count):
                yield start, weight[start : start + count]
            return
        name = self._parameter.sources[0]
        rows = min(count, self.shape[0])
        for start, block in moved(self._reader.row_blocks(name, rows), self._device):
            yield start, block.to(self.dtype)


def moved(
    blocks: Iterator[tuple[int, Tensor]], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Row blocks on a device. A GPU copies and computes while the next block is being read."""
    for start, block in blocks:
        if device.type != "cuda":
            yield start, block.to(device)
            continue
        there = block.to(device, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(device))
        yield start, there
        # The buffer is read into again after this.
        copied.synchronize()


def on_device(reader: TensorReader, name: str, device: torch.device) -> Tensor:
    """A whole stored tensor on a device; on its way it is never whole anywhere else."""
    header = reader.headers.tensors[name]
    if device.type == "cpu" or header.nbytes <= block_bytes(device) or not header.shape:
        return reader.tensor(name).to(device)
    out: Tensor | None = None
    rows = max(1, block_bytes(device) * header.shape[0] // header.nbytes)
    for start, block in moved(reader.row_blocks(name, rows), device):
        if out is None:
            shape = (header.shape[0], *block.shape[1:])
            out = torch.empty(shape, dtype=block.dtype, device=device)
        out[start : start + block.shape[0]] = block
    assert out is not None
    return out
