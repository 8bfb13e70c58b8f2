"""Grouping: which elements of a matrix share one scale.

A grouping says how to spread one value per group over the whole shape. All groupings allow a
ragged last group. ``expand`` is the definition; kernels index directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["Blocks", "Channel", "Flat", "Group", "Grouping", "PerTensor", "Strided"]


def _ceil(value: int, size: int) -> int:
    return -(-value // size)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Base of the groupings. Sizes count elements."""

    @property
    def kind(self) -> str:
        """The name used by kernels' constraints."""
        return type(self).__name__.lower()

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a tensor that holds one value per group of a tensor of ``shape``."""
        raise NotImplementedError

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Spread ``values`` (one per group) so that they broadcast against ``shape``."""
        raise NotImplementedError

    def cut(self, values: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor | None:
        """Those of ``values`` (one per group of a matrix of ``shape``) that belong to its rows
        ``first`` to ``last``, or None where a group crosses a boundary."""
        return None

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        """``amin`` or ``amax`` of each group of ``tensor``, in :meth:`scale_shape`."""
        shape = tuple(tensor.shape)
        out = self.scale_shape(shape)
        numbers = torch.arange(prod(out), device=tensor.device).reshape(out)
        index = self.expand(numbers, shape).expand(shape).reshape(-1)
        first = torch.zeros(prod(out), dtype=tensor.dtype, device=tensor.device)
        return first.scatter_reduce(0, index, tensor.reshape(-1), how, include_self=False).reshape(
            out
        )


@dataclass(frozen=True, slots=True)
class PerTensor(Grouping):
    """One group: the whole tensor."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        return values.reshape(())

    def cut(self, values: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor | None:
        return values


@dataclass(frozen=True, slots=True)
class Channel(Grouping):
    """One group per index of ``axis`` (0: a row, that is an output channel)."""

    axis: int = 0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[self.axis],)

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        view = [1] * len(shape)
        view[self.axis] = shape[self.axis]
        return values.reshape(view)

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        others = [axis for axis in range(tensor.ndim) if axis != self.axis % tensor.ndim]
        result: Tensor = getattr(tensor, how)(dim=others) if others else tensor
        return result

    def cut(self, values: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor | None:
        return values[first:last] if self.axis == 0 else values


@dataclass(frozen=True, slots=True)
class Group(Grouping):
    """Groups of ``size`` consecutive elements of the last axis; none crosses a row.

    With a group index (act-order) an affine form overrides which group an input column is in.
    """

    size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], _ceil(shape[-1], self.size))

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        values = values.reshape(self.scale_shape(shape))
        return values.repeat_interleave(self.size, dim=-1)[..., : shape[-1]]

    def cut(self, values: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor | None:
        return values.reshape(self.scale_shape(shape))[first:last]

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        if tensor.shape[-1] % self.size:
            return Grouping.reduce(self, tensor, how)
        result: Tensor = getattr(tensor.reshape(*tensor.shape[:-1], -1, self.size), how)(dim=-1)
        return result


@dataclass(frozen=True, slots=True)
class Flat(Grouping):
    """Groups of ``size`` consecutive elements of the flattened tensor; they may cross rows."""

    size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (_ceil(prod(shape), self.size),)

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        count = prod(shape)
        spread = values.reshape(-1).repeat_interleave(self.size)[:count]
        return spread.reshape(shape)

    def cut(self, values: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor | None:
        if prod(shape[1:]) % self.size:
            return None
        width = prod(shape[1:]) // self.size
        return values.reshape(-1)[first * width : last * width]


@dataclass(frozen=True, slots=True)
class Strided(Grouping):
    """Groups of ``size`` elements of the flattened tensor that lie ``n / size`` apart.

    The view ``[size, n / size]`` grouped by column: HQQ's axis 0. ``size`` must divide ``n``.
    """

    size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        count = prod(shape)
        if count % self.size:
            raise ValueError(f"strided groups of {self.size} do not divide {count} elements")
        return (count // self.size,)

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        groups = prod(self.scale_shape(shape))
        return values.reshape(1, groups).expand(self.size, groups).reshape(shape)


@dataclass(frozen=True, slots=True)
class Blocks(Grouping):
    """Rectangular blocks ``rows x columns`` of the last two axes, ragged at both edges."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], _ceil(shape[-2], self.rows), _ceil(shape[-1], self.columns))

    def expand(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        values = values.reshape(self.scale_shape(shape))
        tall = values.repeat_interleave(self.rows, dim=-2)[..., : shape[-2], :]
        return tall.repeat_interleave(self.columns, dim=-1)[..., : shape[-1]]

    def cut(self, values: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor | None:
        if len(shape) != 2 or first % self.rows:
            return None
        return values.reshape(self.scale_shape(shape))[first // self.rows : _ceil(last, self.rows)]


def gather_groups(values: Tensor, group_index: Tensor) -> Tensor:
    """Spread per-group values ``[rows, groups]`` by a group index ``[columns]`` (act-order)."""
    return torch.index_select(values, -1, group_index.to(torch.int64))
