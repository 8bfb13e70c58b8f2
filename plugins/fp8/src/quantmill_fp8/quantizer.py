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
from quantmill.rounding import ByteRounding
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
        rows, group = self.config.weight_block_size or (1, target.in_features)
        weights = self.block_weights(target, dtype)
        # Tall blocks can need more rows at once than the reader's buffers would have.
        tall = min(rows, target.out_features) * target.in_features
        beyond = 2 * dtype.itemsize * max(0, tall - weights)
        rounding = ByteRounding(self.kernels, self.device, dtype, VALUES)
        return beyond + rounding.working_bytes(max(weights, tall), target.in_features, group)

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        rows, columns = weight.shape
        grouping, size = grouping_of(self.config), self.config.weight_block_size
        values = torch.empty((rows, columns), dtype=VALUES, device=self.device)
        rounding = ByteRounding(self.kernels, self.device, weight.dtype, VALUES)
        if size is None:
            absmax = torch.zeros((), dtype=torch.float32, device=self.device)
            with FiniteCheck(weight.name) as finite:
                for start, piece in weight.row_blocks():
                    found = rounding.absmax(piece, columns).amax()
                    finite.look(piece, start * columns, maxima=found)
                    absmax = torch.maximum(absmax, found)
            scale, divisor = self._scale(absmax)
            for start, piece in weight.row_blocks():
                part = values[start : start + piece.shape[0]]
                rounding.store(piece, divisor.reshape(1, 1), part, columns)
            return ScaledFloat(values, scale, PerTensor(), dtype=weight.dtype)
        parts = []
        with FiniteCheck(weight.name) as finite:
            for start, piece in weight.row_blocks(size[0]):
                found = _tallest(rounding.absmax(piece, size[1]), size[0])
                finite.look(piece, start * columns, maxima=found)
                scale, divisor = self._scale(found)
                parts.append(scale)
                divisor = divisor.repeat_interleave(size[0], dim=0)[: piece.shape[0]]
                part = values[start : start + piece.shape[0]]
                rounding.store(piece, divisor, part, size[1])
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
        rounding = ByteRounding(self.kernels, self.device, dtype, VALUES)
        weights, columns = self.block_weights(target, dtype), target.in_features
        return rounding.working_bytes(weights, columns, columns)

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        rows, columns = weight.shape
        values = torch.empty((rows, columns), dtype=VALUES, device=self.device)
        scale = torch.empty(rows, dtype=torch.float32, device=self.device)
        rounding = ByteRounding(self.kernels, self.device, weight.dtype, VALUES)
        with FiniteCheck(weight.name) as finite:
            for start, piece in weight.row_blocks():
                found = rounding.absmax(piece, columns)
                finite.look(piece, start * columns, maxima=found)
                stop = start + piece.shape[0]
                part = found.clamp(min=_LEAST_ROW) / TOP
                scale[start:stop] = part.squeeze(1)
                rounding.store(piece, part, values[start:stop], columns)
        return ScaledFloat(values, scale, Channel(0), dtype=weight.dtype)


def _tallest(absmax: Tensor, rows: int) -> Tensor:
    """Largest of each ``rows`` rows of ``[n, groups]``, the last ones may be fewer."""
    ragged = -absmax.shape[0] % rows
    if ragged:
        absmax = torch.nn.functional.pad(absmax, (0, 0, 0, ragged))
    return absmax.unflatten(0, (-1, rows)).amax(dim=1)


def _cat(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype != getattr(torch, "float8_e8m0fnu", None):
        return torch.cat(parts)
    # torch has no cat for it.
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
