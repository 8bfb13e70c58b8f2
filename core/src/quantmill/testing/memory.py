"""Memory of this process as the system counts it: what benchmarks and tests of bounds measure."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

__all__ = ["PeakMemory", "read_weights", "resident"]

_PAGE = 4096


def resident(field: str = "VmRSS") -> int:
    """Bytes in memory now; ``field`` is one of Linux's ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class PeakMemory:
    """The most bytes in memory while a ``with`` block ran, above what there were at its start.

    The system keeps the mark itself, so nothing is missed between two samples. Where it doesn't
    let a process reset the mark, an earlier peak counts too: an upper bound.
    """

    bytes: int
    """At the peak, above the start."""
    anonymous: int
    """Left at the end that lies in no file, above the start."""
    start: int
    """At the start."""
    left: int
    """Left at the end, above the start."""

    def __enter__(self) -> Self:
        self.bytes = self.left = self.anonymous = 0
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.start, self._anonymous = resident(), resident("RssAnon")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bytes = resident("VmHWM") - self.start
        self.left = resident() - self.start
        self.anonymous = resident("RssAnon") - self._anonymous


def read_weights(model: nn.Module) -> int:
    """Read every page of a model's weights; returns the bytes that came into memory by that.

    Weights that stay as they lie on the disk are mapped, and take memory as they are read.
    """
    from quantmill.testing.linears import held_tensors

    before = resident()
    for value in list(held_tensors(model)):
        if value.device.type == "cpu" and value.is_contiguous() and value.numel():
            value.detach().reshape(-1).view(torch.uint8)[::_PAGE].count_nonzero()
    return resident() - before
