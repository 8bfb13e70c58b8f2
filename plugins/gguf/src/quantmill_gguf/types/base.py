"""What a block type is to PyTorch: bytes to float32, bytes to a form of the core, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from quantmill.forms import Form
from quantmill_gguf.types.raw import RawForm
from quantmill_gguf.types.sizes import BY_NAME, TypeSize

_PIECE = 1 << 18
"""Values that are quantized at a time on a CPU, so that intermediate results stay in its cache."""
_LARGE_PIECE = 1 << 25

__all__ = [
    "BlockType",
    "Unpack",
    "half",
    "halves",
    "join_planes",
    "piece_bytes",
    "planes",
]

Unpack = Callable[..., None]
"""``fn(data, *, type_name, out)``: a kernel that takes the codes out of blocks. ``data`` is uint8
``[rows, row bytes]``, ``out`` the memory of the codes in the packing of the type's form."""


def piece_bytes(weights: int) -> int:
    """Memory that :meth:`BlockType.quantize` takes on a CPU for so many weights beside its result,
    in types with a choice to make; those of one scale take half, those with a table half more."""
    return 32 * min(weights, _PIECE)


def planes(data: Tensor, bits: int, width: int) -> Tensor:
    """Codes out of bytes that hold them as bit planes.

    Every run of ``width`` bytes holds ``8 / bits`` runs of ``width`` codes: first the lowest bits
    of all its bytes, then the next ones.

    Args:
        data: uint8 ``[blocks, bytes]``.

    Returns:
        uint8 ``[blocks, bytes * 8 / bits]``.
    """
    runs = data.reshape(data.shape[0], -1, 1, width)
    parts = [runs >> shift for shift in range(0, 8, bits)]
    spread = torch.cat(parts, dim=2) & ((1 << bits) - 1)
    return spread.reshape(data.shape[0], -1)


def join_planes(codes: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of :func:`planes`; bits above ``bits`` are dropped."""
    count = 8 // bits
    runs = (codes & ((1 << bits) - 1)).reshape(codes.shape[0], -1, count, width)
    out = runs[:, :, 0].clone()
    for index in range(1, count):
        out |= runs[:, :, index] << (bits * index)
    return out.reshape(codes.shape[0], -1)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte ``start`` of each block, ``[blocks, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def halves(values: Tensor) -> Tensor:
    """The bytes of float16 ``[blocks, n]`` as uint8 ``[blocks, 2 n]``."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


class BlockType(ABC):
    """A type of blocks. Instances hold no state."""

    name: ClassVar[str]

    @property
    def info(self) -> TypeSize:
        """Number and sizes."""
        return BY_NAME[self.name]

    def blocks(self, raw: Tensor) -> Tensor:
        """uint8 ``[..., row bytes]`` as ``[blocks, block bytes]``."""
        return raw.reshape(-1, self.info.size)

    def decode(self, raw: Tensor) -> Tensor:
        """float32 ``[rows, columns]`` of little-endian bytes uint8 ``[rows, row bytes]``.

        Bit-equal to ggml's reference decoder but for the payload of NaN.
        """
        columns = raw.shape[-1] // self.info.size * self.info.block
        if raw.numel() == 0:
            return torch.empty(*raw.shape[:-1], columns, device=raw.device)
        values = self._decode(self.blocks(raw))
        return values.reshape(*raw.shape[:-1], columns)

    @abstractmethod
    def _decode(self, blocks: Tensor) -> Tensor:
        """float32 ``[blocks, block]`` of uint8 ``[blocks, block bytes]``."""

    def form(
        self, raw: Tensor, dtype: torch.dtype = torch.float32, unpack: Unpack | None = None
    ) -> Form:
        """What the bytes uint8 ``[rows, row bytes]`` stand for, as the core's form where there is
        one. Works on the meta device. ``unpack`` is a kernel for the codes, if there is one."""
        return RawForm(raw, self.name, dtype)

    def raw(self, form: Form) -> Tensor:
        """The exact inverse of :meth:`form`."""
        if not isinstance(form, RawForm):
            raise TypeError(f"{self.name} is not made of a form of kind {form.kind}")
        return form.data

    def quantize(self, values: Tensor, importance: Tensor | None = None) -> Tensor | None:
        """Bytes uint8 ``[..., row bytes]`` of float32 ``[..., columns]``, equal to those of ggml's
        quantizer; None for a type that can't be made here.

        Args:
            values: finite.
            importance: float32 ``[columns]``, what the square of an error in each column costs.
                Types without a choice to make (:attr:`weighs` is false) do not look at it.
        """
        if not self.makes:
            return None
        width = values.shape[-1]
        rows = values.reshape(-1, width)
        out = torch.empty(
            rows.shape[0], self.info.row_bytes(width), dtype=torch.uint8, device=values.device
        )
        weights = importance if self.weighs else None
        most = _PIECE if values.device.type == "cpu" else _LARGE_PIECE
        step = max(1, most // max(1, width))
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step].to(torch.float32)
            made = self._quantize_rows(part, weights)
            out[start : start + step] = made.reshape(part.shape[0], -1)
        return out.reshape(*values.shape[:-1], out.shape[1])

    makes: ClassVar[bool] = False
    """Whether :meth:`quantize` makes it."""
    scales_at: ClassVar[tuple[int, ...] | None] = None
    """Where a block has float16 numbers, if those are not all of its numbers of several bytes."""
    weighs: ClassVar[bool] = False
    """Whether importance changes the bytes."""

    def _quantize_rows(self, rows: Tensor, importance: Tensor | None) -> Tensor:
        """Bytes of float32 ``[rows, columns]``, columns a multiple of the block."""
        block = self.info.block
        if importance is None:
            return self._quantize(rows.reshape(-1, block), None)
        wide = importance.to(rows).expand(rows.shape).reshape(-1, block)
        return self._quantize(rows.reshape(-1, block), wide)

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        """uint8 ``[blocks, block bytes]`` of float32 ``[blocks, block]``; ``importance`` has the
        same shape."""
        raise NotImplementedError(f"{self.name} can't be made")
