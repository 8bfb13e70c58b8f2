"""How far two weights are apart, taken block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantmill.forms import Form, float_rows

__all__ = ["Distance", "between", "paired_rows"]

_ROWS = 1 << 21
"""Weights compared at a time."""


@dataclass(slots=True)
class Distance:
    """Sums over the weights seen so far; ``a`` is the reference."""

    count: int = 0
    signal: float = 0.0
    """Sum of squares of ``a``."""
    noise: float = 0.0
    """Sum of squares of ``b - a``."""
    largest: float = 0.0
    """Largest magnitude of ``b - a``."""
    equal: bool = True

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take float32 blocks of one shape."""
        self.count += a.numel()
        self.signal += float((a.double() ** 2).sum())
        if torch.equal(a, b):
            return
        self.equal = False
        difference = b - a
        self.noise += float((difference.double() ** 2).sum())
        self.largest = max(self.largest, float(difference.abs().max()))

    def join(self, other: Distance) -> None:
        """Take the sums of another."""
        self.count += other.count
        self.signal += other.signal
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)
        self.equal = self.equal and other.equal

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of ``a``; infinite where that is zero."""
        if self.noise == 0.0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal > 0 else math.inf

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in decibels; infinite for equal weights."""
        if self.noise == 0.0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "weights": self.count,
            "equal": self.equal,
            "relative_error": self.relative,
            "snr_db": self.snr,
            "max_error": self.largest,
        }


def paired_rows(a: Form, b: Form) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 blocks of rows of two forms of one shape."""
    count = max(1, _ROWS // max(1, a.shape[-1]))
    # A form that can't be cut comes in one block: then so must the other.
    whole = any(form.cut(0, min(count, form.shape[0])) is None for form in (a, b))
    count = a.shape[0] if whole else count
    for (_, first), (_, second) in zip(float_rows(a, count), float_rows(b, count), strict=True):
        yield first, second


def between(pairs: Iterable[tuple[Tensor, Tensor]]) -> Distance:
    """The distance over blocks of rows."""
    found = Distance()
    for a, b in pairs:
        found.add(a, b)
    return found
