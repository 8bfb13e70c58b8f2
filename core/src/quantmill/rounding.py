"""Float weights to bytes, and to packed codes, with a scale per group of columns: what all methods
that round to nearest have in common.

A kernel reads a block of rows as it is stored, twice; in plain torch it becomes float32 first and
each step goes over all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.forms import Codes
from quantmill.forms.rows import lowest_edge, take_lowest
from quantmill.kernels import KernelRegistry

__all__ = ["BYTES", "ByteRounding", "CodeRounding", "nearest_e2m1"]

_SCALE_BYTES: Final = 28
"""For each scale of a block: the largest magnitude, and what becomes of it on the way."""

_PAIRS: Final = torch.float4_e2m1fn_x2
BYTES: Final = {torch.int8: 127.0, _PAIRS: 6.0, **{kind: torch.finfo(kind).max for kind in (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)}}  # fmt: skip
"""What weights are rounded to, and its largest number. Two of the 4-bit floats are in a byte."""

_AT_ONCE: Final = 1 << 18
"""Weights that become 4-bit floats at once in plain torch, so that what is made on the way stays
in the cache."""


def nearest_e2m1(values: Tensor) -> Tensor:
    """uint8 codes of the nearest 4-bit float, ties to the even code; float32 in, any shape."""
    size = values.abs()
    bits = size.view(torch.int32)
    # One bit of mantissa is kept of 23, rounded; exponents begin at 126 in place of 0.
    normal = (bits + 0x1FFFFF + ((bits >> 22) & 1) >> 22) - 252
    # Below 1 the step is a half: that of the last bit of a float32 from 2**22 on.
    small = (size + 4194304.0).view(torch.int32) & 3
    codes = torch.where(size < 1, small, normal).clamp_(max=7).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


class _Rounding:
    """Kernels for the blocks of one weight of ``dtype``, where there are any."""

    def __init__(self, kernels: KernelRegistry, device: torch.device, dtype: torch.dtype) -> None:
        self._kernels, self.device = kernels, device
        self._dtype = str(dtype).removeprefix("torch.")
        self._absmax = self._kernel("absmax")

    def _kernel(self, operation: str, **traits: object) -> Callable[..., Any] | None:
        choice = self._kernels.choose(
            operation, "tensor", traits, device=self.device.type, dtype=self._dtype
        )
        return None if choice is None else choice.load()

    def absmax(self, block: Tensor, group: int) -> Tensor:
        """Largest magnitudes of groups of ``group`` columns of a float ``[rows, in]``.

        Returns:
            float32 ``[rows, ceil(in / group)]``; not finite where something in the group isn't.
        """
        if self._absmax is not None:
            found: Tensor = self._absmax(block, group=group)
            return found
        work = block.to(torch.float32)
        ragged = -work.shape[1] % group
        if ragged:
            work = torch.nn.functional.pad(work, (0, ragged))
        # Without abs(), which would be a copy of all of it.
        low, high = work.reshape(work.shape[0], -1, group).aminmax(dim=2)
        return torch.maximum(high, low.neg())


class ByteRounding(_Rounding):
    """Rounds the blocks of one weight of ``dtype`` to ``values``, a key of :data:`BYTES`."""

    def __init__(
        self,
        kernels: KernelRegistry,
        device: torch.device,
        dtype: torch.dtype,
        values: torch.dtype,
    ) -> None:
        super().__init__(kernels, device, dtype)
        self._round = self._kernel("round", values=str(values).removeprefix("torch."))
        self._values = values

    def working_bytes(
        self, weights: int, columns: int, group: int, scale_bytes: int = _SCALE_BYTES
    ) -> int:
        """Memory that rounding a block of ``weights`` in rows of ``columns`` takes, with a scale
        for each ``group`` of them, which takes ``scale_bytes``: with kernels that of the scales,
        else float32 copies too."""
        scales = scale_bytes * (weights // max(1, columns) * -(-columns // group))
        copies = 0 if self._absmax is not None and self._round is not None else 1
        if copies and group < columns:
            copies = 2  # Scales for each weight, or a block that is filled up to whole groups.
        pairs = 18 * min(weights, _AT_ONCE) if copies and self._values == _PAIRS else 0
        return scales + 4 * copies * weights + pairs

    def store(
        self,
        block: Tensor,
        by: Tensor,
        out: Tensor,
        group: int,
        *,
        multiply: bool = False,
        top: float | None = None,
    ) -> None:
        """Round a finite float ``[rows, in]`` over (or times) ``by``, half to even, into ``out``.

        Args:
            block: the weights.
            by: float32 ``[rows, ceil(in / group)]``, or one row of that for all rows.
            out: of the dtype ``values``, the shape of ``block``; for pairs of 4-bit floats half as
                wide, the first of them in the low half.
            group: columns that share a number.
            multiply: times ``by``, not over it.
            top: values are held within it on both sides (int8: one further below); by default the
                largest number of ``values``.
        """
        most = BYTES[self._values] if top is None else top
        rows, columns = block.shape
        if self._round is not None:
            wide = by.expand(rows, -1).contiguous()
            self._round(block, by=wide, out=out, group=group, multiply=multiply, top=most)
            return
        if group < columns:
            by = by.repeat_interleave(group, dim=1)[:, :columns]
        work = block.to(torch.float32, copy=True)
        scaled = work.mul_(by) if multiply else work.div_(by)
        if self._values == torch.int8:
            out.copy_(scaled.round_().clamp_(-most - 1, most))
        elif self._values == _PAIRS:
            step = max(1, _AT_ONCE // columns)
            scaled.clamp_(-most, most)
            pairs = out.view(torch.uint8)
            for start in range(0, rows, step):
                codes = nearest_e2m1(scaled[start : start + step])
                pairs[start : start + step] = codes[:, ::2] | codes[:, 1::2] << 4
        else:
            out.copy_(scaled.clamp_(-most, most))


class CodeRounding(_Rounding):
    """Rounds the blocks of one weight of ``dtype`` to packed codes of ``bits`` bits; groups divide
    rows."""

    def __init__(
        self, kernels: KernelRegistry, device: torch.device, dtype: torch.dtype, bits: int
    ) -> None:
        super().__init__(kernels, device, dtype)
        self._extremes = self._kernel("extremes")
        self._round = self._kernel("round_codes")
        self._bits = bits

    def working_bytes(self, weights: int, columns: int, group: int) -> int:
        """The same as :meth:`ByteRounding.working_bytes`; without kernels a float32 copy and its
        codes, and their packing."""
        scales = _SCALE_BYTES * (weights // max(1, columns) * -(-columns // group))
        if self._absmax is not None and self._extremes is not None and self._round is not None:
            return scales
        return scales + 5 * weights + Codes.packing_bytes(weights, self._bits)

    def extremes(self, block: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Least and largest values of groups of ``group`` columns of a float ``[rows, in]``.

        Returns:
            Two of float32 ``[rows, in / group]``; their difference is not finite where something
            in the group isn't.
        """
        if self._extremes is not None:
            low, high = self._extremes(block, group=group)
        else:
            work = block.to(torch.float32).reshape(block.shape[0], -1, group)
            low, high = work.amin(dim=2), work.amax(dim=2)
        # Which zero is the least one is anybody's choice.
        return low.add_(0.0), high.add_(0.0)

    def store(
        self,
        block: Tensor,
        by: Tensor,
        out: Tensor,
        group: int,
        *,
        minus: Tensor | None = None,
        plus: Tensor | None = None,
        multiply: bool = False,
        middle: int = 0,
        limits: tuple[int, int] | None = None,
        lowest: bool = False,
    ) -> None:
        """Write ``round(value / by - minus) + plus + middle``, half to even, as packed codes.

        Args:
            block: finite float ``[rows, in]``, of which the codes fill bytes, or the last rows.
            by: float32 ``[rows, in / group]``.
            out: uint8, the bytes of all codes of the weight or of its rows from these on: the first
                of them are written.
            group: columns that share a number.
            minus: shaped as ``by``; nothing if None.
            plus: the same, whole numbers.
            multiply: times ``by``, not over it.
            middle: added to all.
            limits: least and largest code; all of ``bits`` bits by default.
            lowest: what lies a scale's rounding above the middle of the two lowest steps goes to
                the lowest (:func:`quantmill.forms.rows.take_lowest`); without ``plus``.
        """
        bits = self._bits
        least, most = limits or (0, 2**bits - 1)
        out = out.reshape(-1)[: -(-block.numel() * bits // 8)]
        if self._round is not None:
            self._round(
                block,
                by=by.contiguous(),
                minus=minus,
                plus=plus,
                out=out,
                group=group,
                multiply=multiply,
                bits=bits,
                middle=float(middle),
                edge=lowest_edge(least - middle) if lowest else float("-inf"),
                limits=(least, most),
            )
            return
        work = block.to(torch.float32, copy=True).reshape(*by.shape, group)
        wide = by.unsqueeze(2)
        scaled = work.mul_(wide) if multiply else work.div_(wide)
        if minus is not None:
            scaled.sub_(minus.unsqueeze(2))
        if lowest:
            take_lowest(scaled, least - middle)
        codes = scaled.round_()
        if plus is not None:
            codes.add_(plus.unsqueeze(2))
        codes = codes.add_(middle).clamp_(least, most).to(torch.uint8)
        out.copy_(Codes.pack(codes, bits, "dense").data)
