"""Quantizes to FP8, streaming by row blocks.

The rule is the definition of DeepSeek-V3 (arXiv 2412.19437, 3.3.2) and of FBGEMM's row-wise
quantization: ``scale = absmax / 448`` in float32, ``value = round(w / scale)`` to the nearest
float8_e4m3fn, ties to even. 448 is the largest finite E4M3 number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.backend import Quantizer, WeightSource
from quantmill.finite import FiniteCheck
from quantmill.forms import Channel, Form, PerTensor, ScaledFloat
from quantmill.targeting.types import Target
from quantmill_fp8.codec import grouping_of
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config
from quantmill_fp8.form import VALUES, abstract_form

__all__ = ["BlockQuantizer", "RowQuantizer"]

TOP = 448.0
_TINY = torch.finfo(torch.float32).tiny
_LEAST_ROW = 1e-12
"""FBGEMM scales a row as if its absmax were at least this."""


class BlockQuantizer(Quantizer[Fp8Config]):
    """Blocks of rows and columns, or the whole weight."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        shape = (target.out_features, target.in_features)
        kind = torch.float8_e8m0fnu if self.config.scale_fmt == "ue8m0" else torch.float32
        return abstract_form(shape, grouping_of(self.config), kind, dtype)

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        # Tall blocks need more rows at once than the reader's buffer would have; in float32.
        rows, columns = self.config.weight_block_size or (1, 1)
        tall = 4 * min(rows, target.out_features) * target.in_features
        # Then copies of a row block in float32, more of them where blocks lie within rows.
        each = 8 if rows == 1 < columns else 2
        return tall + each * self.block_weights(target, dtype)

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        rows, columns = weight.shape
        grouping, size = grouping_of(self.config), self.config.weight_block_size
        values = torch.empty((rows, columns), dtype=VALUES, device=self.device)
        if size is None:
            absmax = torch.zeros((), dtype=torch.float32, device=self.device)
            with FiniteCheck(weight.name) as finite:
                for start, piece in weight.row_blocks():
                    found = block_absmax(piece.to(torch.float32), piece.shape[0], columns)
                    finite.look(piece, start * columns, maxima=found)
                    absmax = torch.maximum(absmax, found.reshape(()))
            scale, divisor = self._scale(absmax)
            for start, piece in weight.row_blocks():
                work = piece.to(torch.float32, copy=True)
                _store(work.div_(divisor), values[start : start + piece.shape[0]])
            return ScaledFloat(values, scale, PerTensor(), dtype=weight.dtype)
        parts = []
        with FiniteCheck(weight.name) as finite:
            for start, piece in weight.row_blocks(size[0]):
                work = piece.to(torch.float32, copy=True)
                found = block_absmax(work, *size)
                finite.look(piece, start * columns, maxima=found)
                scale, divisor = self._scale(found)
                parts.append(scale)
                divide_blocks(work, divisor, *size)
                _store(work, values[start : start + piece.shape[0]])
        return ScaledFloat(values, _cat(parts), grouping, dtype=weight.dtype)

    def _scale(self, absmax: Tensor) -> tuple[Tensor, Tensor]:
        """The scales to store, and the same in float32."""
        # A block of zeros has the scale one; a quotient below the normal numbers would be coarse.
        scale = torch.where(absmax > 0, (absmax / TOP).clamp(min=_TINY), torch.ones_like(absmax))
        if self.config.scale_fmt == "float":
            return scale, scale
        # The next power of two, from the bits: a logarithm could miss an exact one.
        mantissa, exponent = torch.frexp(scale)
        power = exponent - (mantissa == 0.5).to(exponent.dtype)
        stored = (power + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return stored, stored.to(torch.float32)


class RowQuantizer(Quantizer[FbgemmFp8Config]):
    """One scale per row."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        shape = (target.out_features, target.in_features)
        return abstract_form(shape, Channel(0), torch.float32, dtype)

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        # A row block in float32, and what becomes of it on the way to the values.
        return 10 * self.block_weights(target, dtype)

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        rows, columns = weight.shape
        values = torch.empty((rows, columns), dtype=VALUES, device=self.device)
        scale = torch.empty(rows, dtype=torch.float32, device=self.device)
        with FiniteCheck(weight.name) as finite:
            for start, piece in weight.row_blocks():
                work = piece.to(torch.float32, copy=True)
                found = block_absmax(work, 1, columns)
                finite.look(piece, start * columns, maxima=found)
                stop = start + piece.shape[0]
                scale[start:stop] = found.reshape(-1).clamp(min=_LEAST_ROW) / TOP
                _store(work.div_(scale[start:stop].unsqueeze(1)), values[start:stop])
        return ScaledFloat(values, scale, Channel(0), dtype=weight.dtype)


def block_absmax(work: Tensor, rows: int, columns: int) -> Tensor:
    """Largest magnitude of each block of a float32 ``[n, in]``; NaN where one is inside.

    Returns:
        float32 ``[ceil(n / rows), ceil(in / columns)]``.
    """
    if rows == 1 and columns == work.shape[1]:
        low, high = work.aminmax(dim=1, keepdim=True)
        return torch.maximum(high, low.neg())
    whole = work.shape[0] // rows * rows
    parts = []
    for part in (work[:whole].unflatten(0, (-1, rows)) if whole else None, work[whole:][None]):
        # Without abs(), which would be a copy of all of it.
        if part is not None and part.shape[1]:
            parts.append(torch.maximum(part.amax(dim=1), part.amin(dim=1).neg()))
    tall = _cat(parts)
    tall = torch.nn.functional.pad(tall, (0, -tall.shape[1] % columns))
    return tall.unflatten(1, (-1, columns)).amax(dim=2)


def divide_blocks(work: Tensor, divisor: Tensor, rows: int, columns: int) -> None:
    """Divide each block of a float32 ``[n, in]`` by its number, in place."""
    wide = divisor.repeat_interleave(columns, dim=1)[:, : work.shape[1]]
    whole = work.shape[0] // rows
    if whole:
        work[: whole * rows].unflatten(0, (whole, rows)).div_(wide[:whole].unsqueeze(1))
    if whole < wide.shape[0]:
        work[whole * rows :].div_(wide[whole:])


def _store(scaled: Tensor, out: Tensor) -> None:
    """Round to ``out``; ``scaled`` is used up. A quotient may exceed the largest by a rounding."""
    out.copy_(scaled.clamp_(-TOP, TOP))


def _cat(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype != getattr(torch, "float8_e8m0fnu", None):
        return torch.cat(parts)
    # torch has no cat for it.
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
