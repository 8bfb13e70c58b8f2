"""Float weights to bytes with a scale per group of columns: what int8 and 8-bit floats have in
common.

A kernel reads a block of rows as it is stored, twice; in plain torch it becomes float32 first and
each step goes over all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.kernels import KernelRegistry

__all__ = ["BYTES", "ByteRounding"]

BYTES: Final = {torch.int8: 127.0, **{kind: torch.finfo(kind).max for kind in (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)}}  # fmt: skip
"""What weights are rounded to, and its largest number."""


class ByteRounding:
    """Rounds the blocks of one weight of ``dtype`` to ``values``, a key of :data:`BYTES`."""

    def __init__(
        self,
        kernels: KernelRegistry,
        device: torch.device,
        dtype: torch.dtype,
        values: torch.dtype,
    ) -> None:
        def kernel(operation: str) -> Callable[..., Any] | None:
            traits = {"values": str(values).removeprefix("torch.")}
            kind = str(dtype).removeprefix("torch.")
            choice = kernels.choose(operation, "tensor", traits, device=device.type, dtype=kind)
            return None if choice is None else choice.load()

        self._absmax = kernel("absmax")
        self._round = kernel("round")
        self._values = values

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
            out: of the dtype ``values``, the shape of ``block``.
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
        else:
            out.copy_(scaled.clamp_(-most, most))
