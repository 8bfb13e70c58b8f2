"""What llama.cpp's converter does to a tensor beside renaming it, and the way back.

A move of whole rows holds for quantized rows too: a row is whole blocks. Source: the converters
of llama.cpp (``conversion/*.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Both",
    "GroupedQkv",
    "Heads",
    "MinusExp",
    "Move",
    "PerHeadQkv",
    "PlusOne",
    "RowOrder",
    "Squeezed",
    "TiledColumns",
    "TiledHeads",
    "Transposed",
]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """No change."""

    packed: ClassVar[bool] = True
    """Holds for quantized rows."""
    plain: ClassVar[bool] = True
    """The parameter's elements lie in the file as they do in the model."""
    biases: ClassVar[bool] = True
    """Done to the bias of a module too."""

    def keeps(self, block: int) -> bool:
        """Whether it holds for rows of blocks of so many values each."""
        return self.packed

    def shape(self, shape: Shape) -> Shape:
        """The parameter's shape, from the tensor's."""
        return shape

    def file_shape(self, shape: Shape) -> Shape:
        """The tensor's shape, from the parameter's."""
        return shape

    def problem(self, shape: Shape) -> str:
        """Why a tensor of ``shape`` can't be moved so; empty if it can."""
        return ""

    def read(self, tensor: Tensor) -> Tensor:
        """The parameter, from the tensor's values."""
        return tensor

    def write(self, tensor: Tensor) -> Tensor:
        """The tensor's values, from the parameter."""
        return tensor

    def read_rows(self, rows: Tensor) -> Tensor:
        """Quantized rows ``[out, row bytes]`` in the order of the model."""
        return rows

    def write_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`read_rows`."""
        return rows


class RowOrder(Move):
    """Rows (elements, of a vector) lie in another order."""

    __slots__ = ()
    plain: ClassVar[bool] = False

    def order(self, rows: int) -> Tensor:
        """For each row of the parameter, the row of the tensor it is."""
        raise NotImplementedError

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.order(tensor.shape[0]))

    def write(self, tensor: Tensor) -> Tensor:
        import torch

        return tensor.index_select(0, torch.argsort(self.order(tensor.shape[0])))

    def read_rows(self, rows: Tensor) -> Tensor:
        return self.read(rows)

    def write_rows(self, rows: Tensor) -> Tensor:
        return self.write(rows)


@dataclass(frozen=True, slots=True)
class Heads(RowOrder):
    """Of each head, llama.cpp has rows ``0, n/2, 1, n/2 + 1, ...`` for its rotary embedding."""

    heads: int

    def problem(self, shape: Shape) -> str:
        bad = not shape or shape[0] == 0 or shape[0] % (2 * self.heads)
        return f"{self.heads} heads don't divide its rows evenly" if bad else ""

    def order(self, rows: int) -> Tensor:
        import torch

        index = torch.arange(rows).view(self.heads, rows // self.heads // 2, 2)
        return index.transpose(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class GroupedQkv(RowOrder):
    """Falcon: the parameter has groups of queries, each with its key and value; the file has all
    queries, then all keys, then all values."""

    heads: int
    groups: int

    def problem(self, shape: Shape) -> str:
        count = self.heads + 2 * self.groups
        bad = not shape or self.heads % self.groups or shape[0] % count
        return f"{self.heads} heads in {self.groups} groups don't divide its rows" if bad else ""

    def order(self, rows: int) -> Tensor:
        import torch

        width = rows // (self.heads + 2 * self.groups)
        index = torch.arange(rows)
        query, key, value = index.split(
            [self.heads * width, self.groups * width, self.groups * width]
        )
        parts = [
            query.view(self.groups, -1, width),
            key.view(self.groups, 1, width),
            value.view(self.groups, 1, width),
        ]
        return torch.cat(parts, dim=1).reshape(-1)


@dataclass(frozen=True, slots=True)
class PerHeadQkv(RowOrder):
    """Bloom: query, key and value of each head; the file has all queries first."""

    heads: int

    def problem(self, shape: Shape) -> str:
        bad = not shape or shape[0] % (3 * self.heads)
        return f"{self.heads} heads of three parts don't divide its rows" if bad else ""

    def order(self, rows: int) -> Tensor:
        import torch

        return torch.arange(rows).view(3, self.heads, -1).transpose(0, 1).reshape(-1)


@dataclass(frozen=True, slots=True)
class TiledHeads(RowOrder):
    """Gated delta net: heads of values that share a key lie together in the model; in the file
    come the first of every key, then the second of every key. Rows before ``offset`` stay."""

    keys: int
    each: int
    """Heads of values for a key."""
    width: int = 1
    """Rows of a head."""
    offset: int = 0

    def problem(self, shape: Shape) -> str:
        wanted = self.offset + self.keys * self.each * self.width
        return f"its heads have {wanted} rows" if not shape or shape[0] != wanted else ""

    def order(self, rows: int) -> Tensor:
        import torch

        moved = torch.arange(rows - self.offset).view(self.each, self.keys, self.width)
        moved = moved.transpose(0, 1).reshape(-1) + self.offset
        return torch.cat([torch.arange(self.offset), moved])


@dataclass(frozen=True, slots=True)
class TiledColumns(Move):
    """The same for the matrix that takes the heads in: its columns are in another order. That
    holds for quantized rows where a head is whole blocks."""

    packed: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    biases: ClassVar[bool] = False
    keys: int
    each: int
    width: int

    def keeps(self, block: int) -> bool:
        return self.width % block == 0

    def problem(self, shape: Shape) -> str:
        wanted = self.keys * self.each * self.width
        return f"its heads have {wanted} columns" if shape[-1:] != (wanted,) else ""

    def read(self, tensor: Tensor) -> Tensor:
        parts = tensor.unflatten(-1, (self.each, self.keys, -1))
        return parts.transpose(-3, -2).flatten(-3)

    def write(self, tensor: Tensor) -> Tensor:
        parts = tensor.unflatten(-1, (self.keys, self.each, -1))
        return parts.transpose(-3, -2).flatten(-3)

    def read_rows(self, rows: Tensor) -> Tensor:
        return self.read(rows)

    def write_rows(self, rows: Tensor) -> Tensor:
        return self.write(rows)


@dataclass(frozen=True, slots=True)
class Both(Move):
    """First one move, then another, as a file is read."""

    packed: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    biases: ClassVar[bool] = False
    first: Move
    last: Move

    def problem(self, shape: Shape) -> str:
        return self.first.problem(shape) or self.last.problem(self.first.shape(shape))

    def shape(self, shape: Shape) -> Shape:
        return self.last.shape(self.first.shape(shape))

    def file_shape(self, shape: Shape) -> Shape:
        return self.first.file_shape(self.last.file_shape(shape))

    def read(self, tensor: Tensor) -> Tensor:
        return self.last.read(self.first.read(tensor))

    def write(self, tensor: Tensor) -> Tensor:
        return self.first.write(self.last.write(tensor))


class PlusOne(Move):
    """The weight of a norm that the model adds one to; llama.cpp adds none."""

    __slots__ = ()
    packed: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    biases: ClassVar[bool] = False

    def read(self, tensor: Tensor) -> Tensor:
        return tensor - 1

    def write(self, tensor: Tensor) -> Tensor:
        return tensor + 1


class MinusExp(Move):
    """Mamba: the logarithm of what the file has with a minus sign."""

    __slots__ = ()
    packed: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    biases: ClassVar[bool] = False

    def read(self, tensor: Tensor) -> Tensor:
        return (-tensor).log()

    def write(self, tensor: Tensor) -> Tensor:
        return -tensor.exp()


class Transposed(Move):
    """The model has ``[in, out]``, or experts of that; quantized rows are of ``[out, in]``."""

    __slots__ = ()
    plain: ClassVar[bool] = False
    biases: ClassVar[bool] = False

    def shape(self, shape: Shape) -> Shape:
        return (*shape[:-2], shape[-1], shape[-2])

    def file_shape(self, shape: Shape) -> Shape:
        return self.shape(shape)

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous()

    def write(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous()


@dataclass(frozen=True, slots=True)
class Squeezed(Move):
    """An axis of length 1 that files leave out, most of them: the parameter has ``rank`` axes."""

    packed: ClassVar[bool] = False
    biases: ClassVar[bool] = False
    axis: int
    rank: int

    def shape(self, shape: Shape) -> Shape:
        if len(shape) == self.rank:
            return shape
        return (*shape[: self.axis], 1, *shape[self.axis :])

    def file_shape(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], *shape[self.axis + 1 :])

    def read(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == self.rank else tensor.unsqueeze(self.axis)

    def write(self, tensor: Tensor) -> Tensor:
        return tensor.squeeze(self.axis)
