"""What the engine holds at its worst while it goes through a float checkpoint, from a plan.

Modules come in the order of the checkpoint's files. One that is quantized streams through two
buffers, which stay for those after it and count as far as they were filled; besides them there are
its form and what its quantizer works with. One that stays as it is is read whole when it is
written, and lies mapped from the file in a model on the CPU. A model keeps what it has; of a
checkpoint that is written, each module is gone when the next one comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from quantmill.backend import block_bytes
from quantmill.checkpoint.dtypes import torch_dtype

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill.planning import ModulePlan

__all__ = ["loading_peak", "writing_peak"]


def loading_peak(job: Job, modules: Sequence[ModulePlan]) -> int:
    """Bytes at the peak of loading a live model; what lies in mapped files counts as read."""
    buffers = _Buffers(job)
    # Mapped tensors may be read at any time: they count from the beginning.
    held = sum(item.bytes_memory for item in modules if item.action != "quantize")
    peak = held
    for item in _ordered(job, modules):
        if item.action != "quantize":
            continue
        streamed = buffers.take(item)
        held += item.bytes_memory
        peak = max(peak, held + streamed + max(item.working_bytes, item.building_bytes))
    return peak


def writing_peak(job: Job, modules: Sequence[ModulePlan]) -> int:
    """Bytes at the peak of quantizing into a checkpoint, without calibration."""
    buffers = _Buffers(job)
    peak = 0
    for item in _ordered(job, modules):
        if item.action == "quantize":
            made = max(item.working_bytes, item.encoding_bytes)
            own = buffers.take(item) + item.bytes_after + made
        else:
            changed = item.bytes_after if item.bytes_after != item.bytes_before else 0
            own = buffers.filled + item.bytes_before + changed
        peak = max(peak, own)
    return peak


class _Buffers:
    """The reader's two buffers: how far they were filled up to now."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._size = block_bytes(torch.device(job.device))
        self._one = self._two = 0

    @property
    def filled(self) -> int:
        """Bytes of both."""
        return self._one + self._two

    def take(self, item: ModulePlan) -> int:
        """Bytes in memory of what the weight of a quantized entry is read with."""
        job, target = self._job, item.target
        assert job.architecture is not None
        if job.prequantized:
            if torch.device(job.device).type != "cpu":
                self._fill(item.bytes_before)
            return self.filled  # On the CPU it lies mapped.
        assert target is not None
        parameter = target.module.parameters[target.parameter]
        stored = torch_dtype(parameter.dtype)
        size = target.weights * stored.itemsize
        if target.transposed or target.experts or job.architecture.converted(parameter):
            # It is made as a whole; turning it takes a copy.
            return self.filled + size * (2 if target.transposed else 1)
        self._fill(size)
        wanted = stored if job.dtype is None else getattr(torch, job.dtype)
        cast = 0 if wanted == stored else wanted.itemsize
        return self.filled + min(self._size, size) // stored.itemsize * cast

    def _fill(self, size: int) -> None:
        first = min(self._size, size)
        self._one = max(self._one, first)
        self._two = max(self._two, min(self._size, size - first))


def _ordered(job: Job, modules: Sequence[ModulePlan]) -> list[ModulePlan]:
    """Entries as their tensors lie in the files."""
    assert job.architecture is not None
    places = {
        module.name: job.headers.place(
            name for item in module.parameters.values() for name in item.sources
        )
        for module in job.architecture.modules
    }
    absent = job.headers.place(())

    def place(item: ModulePlan) -> tuple[str, int]:
        return places.get(item.name if item.target is None else item.target.name, absent)

    return sorted(modules, key=place)
