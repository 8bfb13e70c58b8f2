"""The core's affine form with what HQQ's files say beside it, and the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantmill.forms import Affine, Codes, Flat, Group, Grouping, Strided

__all__ = ["Layout", "Settings", "StoredAffine", "abstract_form", "grouping_of"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file says of a weight besides its numbers, kept to be written back."""

    optimize: bool = True
    round_zero: bool = False
    offload_meta: bool = False
    view: torch.dtype | None = None
    """``view_as_float``: the words of the codes are stored as if they were these floats."""
    nbits: float | None = None
    """As stored, where codes lie in wider words: 5, 6 (in 8 bits) and 1.58 (in 2)."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredAffine(Affine):
    """A weight of a file."""

    settings: Settings = Settings()


@dataclass(frozen=True, slots=True)
class Layout:
    """What the shapes of ``W_q`` and ``scale`` say."""

    bits: int
    size: int
    axis: int

    def matrix(self, count: int) -> tuple[int, int]:
        """Rows and columns of the codes as they are packed, for ``count`` weights."""
        groups = count // self.size
        return (groups, self.size) if self.axis == 1 else (self.size, groups)

    def column(self, count: int) -> tuple[int, int]:
        """Shape of scales and zero points on disk."""
        groups = count // self.size
        return (groups, 1) if self.axis == 1 else (1, groups)


def grouping_of(size: int, axis: int, columns: int) -> Grouping:
    """The grouping; groups that never cross a row are :class:`Group`, for which kernels are."""
    if axis == 0:
        return Strided(size)
    return Flat(size) if columns % size else Group(size)


def abstract_form(
    layout: Layout,
    shape: tuple[int, int],
    scale: torch.dtype,
    dtype: torch.dtype,
    settings: Settings | None = None,
) -> StoredAffine:
    """A form on the meta device; without ``settings`` those that hqq makes."""
    meta = torch.device("meta")
    grouping = grouping_of(layout.size, layout.axis, shape[1])
    groups = grouping.scale_shape(shape)
    return StoredAffine(
        Codes.empty(shape, layout.bits, "dense", meta),
        torch.empty(groups, dtype=scale, device=meta),
        grouping,
        torch.empty(groups, dtype=scale, device=meta),
        "zero",
        dtype=dtype,
        settings=settings or Settings(round_zero=layout.bits == 4),
    )
