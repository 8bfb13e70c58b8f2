"""NaN and infinity in a weight: found block by block, in the quantizer's own pass over it."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Self

import torch

from quantmill.backend import NonFiniteWeight

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

__all__ = ["FiniteCheck", "first_non_finite"]


def first_non_finite(values: Tensor) -> Tensor:
    """Flat index of the first NaN or infinity, or -1: an int64 scalar on the values' device, so
    that nobody waits for it."""
    finite = torch.isfinite(values.reshape(-1))
    first = torch.argmin(finite.to(torch.uint8)) if finite.numel() else finite.sum()
    return torch.where(finite.all(), -1, first)


class FiniteCheck:
    """Watches a weight that streams, as a context manager around the loop over its blocks.

    On the CPU the block that holds NaN or infinity is told at once; on other devices at the end
    of the ``with`` block, since asking at each block would make it wait for the device.

    Raises:
        NonFiniteWeight: with the first such element.
    """

    def __init__(self, name: str) -> None:
        """``name`` is the weight's."""
        self._name = name
        self._open: list[tuple[int, Tensor]] = []

    def look(self, values: Tensor, first: int = 0, *, maxima: Tensor | None = None) -> None:
        """Look through a block whose first element is number ``first`` of the weight.

        ``maxima``, such as the absmax of its rows, are looked at in its place where they tell.
        """
        if values.device.type == "cpu":
            # The extremes tell, at a tenth of the time that asking each element takes.
            asked = values if maxima is None else maxima
            if asked.numel() and not all(map(isfinite, torch.stack(asked.aminmax()).tolist())):
                self.found(int(first_non_finite(values)), first)
            return
        self._open.append((first, first_non_finite(values)))

    def found(self, index: int | Tensor, first: int = 0) -> None:
        """Take what a kernel found in such a block: a flat index, or -1."""
        if isinstance(index, int) or index.device.type == "cpu":
            index = int(index)
            if index >= 0:
                raise NonFiniteWeight(self._name, first + index)
            return
        self._open.append((first, index))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None or not self._open:
            return
        indices = torch.stack([index for _, index in self._open]).tolist()
        for (first, _), index in zip(self._open, indices, strict=True):
            if index >= 0:
                raise NonFiniteWeight(self._name, first + int(index))
