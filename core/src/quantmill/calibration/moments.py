"""Second moments of a linear's inputs: what calibrated methods weigh errors with.

Where the inputs that the float model would give are known too, what those add to the inputs at hand
is correlated with them: ``cross``.

Sums run in float32 over *lanes*: the batches are cut into at most eight runs, each is summed in
the order of its batches, and the lanes' sums are added in their order. Whoever works on a lane,
one process or several, the same additions happen in the same order: the same bytes come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantmill.kernels import KernelRegistry
from quantmill.processes import Processes

__all__ = ["LANES", "Moments", "lane_owner", "lanes_of"]

LANES = 8
"""Most lanes, and so most processes that share batches."""
_WIDE = 512
"""From this width on only blocks on and above the diagonal are computed."""


def lanes_of(batches: int) -> list[int]:
    """The lane of each of that many batches."""
    count = min(LANES, batches)
    return [number * count // batches for number in range(batches)]


def lane_owner(lane: int, lanes: int, processes: int) -> int:
    """The process that works on a lane."""
    return lane * processes // lanes


class Moments:
    """``X.T @ X / tokens`` of all inputs ``X [tokens, in]``, float32, and their mean magnitude."""

    def __init__(
        self,
        columns: int,
        device: torch.device,
        lanes: Sequence[int],
        processes: Processes,
        kernels: KernelRegistry,
        magnitudes: bool = False,
        exact: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Args:
        columns: width of the inputs.
        device: where they are.
        lanes: lane of each batch, ascending, see :func:`lanes_of`.
        processes: those that share the batches.
        kernels: may have a faster ``moments``.
        magnitudes: whether ``magnitude`` is asked for.
        exact: by batch, the inputs ``[tokens, in]`` in the float model, if ``cross`` is asked for.
        """
        self._columns, self._device = columns, device
        self._lanes, self._processes, self._kernels = lanes, processes, kernels
        self._magnitudes, self._exact = magnitudes, exact
        self._tokens = [0] * (max(lanes, default=-1) + 1)
        self._lane = -1
        self._part: list[Tensor] | None = None
        self._sum: list[Tensor] | None = None
        """Of the first process's lanes so far; they come before all others."""
        self._closed: dict[int, list[Tensor]] = {}
        """Of another process's lanes, each alone."""
        self.tokens = 0
        """How many there were, once joined."""
        self.square = torch.empty(0, device=device)
        """Mean of ``x x.T``, float32 ``[in, in]``, once joined."""
        self.magnitude = torch.empty(0, device=device)
        """Mean of ``|x|``, float32 ``[in]``, once joined."""
        self.cross: Tensor | None = None
        """Mean of ``x (f - x).T``, f being the float model's input, float32 ``[in, in]``."""

    def add(self, inputs: Tensor, batch: int) -> None:
        """Add inputs ``[tokens, in]`` of batch number ``batch``; batches come in order."""
        lane = self._lanes[batch]
        if lane != self._lane:
            self._close()
            self._lane = lane
        if self._part is None:
            self._part = self._zeros()
        self._tokens[lane] += inputs.shape[0]
        self._accumulate(inputs, self._part[0])
        if self._magnitudes:
            self._part[1] += inputs.abs().sum(0, dtype=torch.float64)
        if self._exact is not None:
            own = inputs.to(torch.float32)
            self._part[-1].addmm_(own.t(), self._exact[batch].to(torch.float32) - own)

    def _zeros(self) -> list[Tensor]:
        # Made when the first inputs come: the moments of a block are not all there at once.
        made = [torch.zeros(self._columns, self._columns, device=self._device)]
        if self._magnitudes:
            made.append(torch.zeros(self._columns, dtype=torch.float64, device=self._device))
        if self._exact is not None:
            made.append(torch.zeros(self._columns, self._columns, device=self._device))
        return made

    def _accumulate(self, inputs: Tensor, total: Tensor) -> None:
        dtype = str(inputs.dtype).removeprefix("torch.")
        choice = self._kernels.choose(
            "moments", "tensor", {}, device=self._device.type, dtype=dtype
        )
        if choice is not None:
            choice.load()(inputs.contiguous(), out=total)
            return
        work = inputs.to(torch.float32)
        columns = self._columns
        step = columns if columns < _WIDE or self._device.type != "cpu" else -(-columns // 8)
        for start in range(0, columns, step):
            rows = work[:, start : start + step]
            total[start : start + step, start:].addmm_(rows.t(), work[:, start:])

    def _close(self) -> None:
        """A lane is complete."""
        part, self._part = self._part, None
        if part is None:
            return
        if not self._processes.first:
            self._closed[self._lane] = part
        elif self._sum is None:
            self._sum = part
        else:
            _add(self._sum, part)
            self._part = [tensor.zero_() for tensor in part]  # its memory serves again

    def join(self) -> None:
        """Bring all lanes together; every process calls it, in the same order."""
        self._close()
        self._part = None
        processes = self._processes
        counts = [sum(column) for column in zip(*processes.gather(self._tokens), strict=True)]
        self.tokens = sum(counts)
        total, self._sum = self._sum, None
        lanes = len(counts)
        own = [lane for lane in range(lanes) if lane_owner(lane, lanes, processes.size) == 0]
        if processes.size > 1 and any(counts[lane] for lane in own):
            total = total if total is not None else self._zeros()
            for tensor in total:
                processes.broadcast(tensor, 0)
        for lane in range(len(own), lanes):
            if not counts[lane]:
                continue
            part = self._closed.pop(lane, None) or self._zeros()
            for tensor in part:
                processes.broadcast(tensor, lane_owner(lane, lanes, processes.size))
            if total is None:
                total = part
            else:
                _add(total, part)
        if total is None:
            return
        self.square = _mirrored(total[0]).div_(self.tokens)
        if self._magnitudes:
            self.magnitude = (total[1] / self.tokens).to(torch.float32)
        if self._exact is not None:
            self.cross = total[-1].div_(self.tokens)

    @property
    def finite(self) -> bool:
        """Whether all inputs were, and their squares too."""
        # The diagonal bounds the rest.
        return bool(torch.isfinite(self.square.diagonal()).all())

    def free(self) -> None:
        """They have served."""
        self.square = torch.empty(0, device=self._device)
        self.cross = None


def _add(total: list[Tensor], part: list[Tensor]) -> None:
    for into, tensor in zip(total, part, strict=True):
        into.add_(tensor)


def _mirrored(upper: Tensor) -> Tensor:
    """The lower triangle filled from the upper one, in place and by blocks."""
    columns = upper.shape[0]
    for start in range(0, columns, _WIDE):
        stop = min(columns, start + _WIDE)
        square = upper[start:stop, start:stop].triu()
        upper[start:stop, start:stop] = square + square.triu(1).t()
        upper[stop:, start:stop] = upper[start:stop, stop:].t()
    return upper
