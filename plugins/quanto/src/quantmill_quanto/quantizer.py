"""Quantizes to Quanto's formats, streaming by row blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.backend import Quantizer, WeightSource
from quantmill.finite import FiniteCheck
from quantmill.forms import Affine, Codes, Form, ScaledFloat
from quantmill.forms.rows import whole_bytes
from quantmill.rounding import BYTES, ByteRounding, CodeRounding
from quantmill.targeting.types import Target
from quantmill_quanto.codec import abstract_form, group_size, grouping_of
from quantmill_quanto.config import FLOATS, QuantoConfig
from quantmill_quanto.forms import joined

__all__ = ["QuantoQuantizer"]

_STORED = (torch.float32, torch.bfloat16, torch.float16)


def _taken(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scales and shifts: that of the weight."""
    return dtype if dtype in _STORED else torch.float32


class QuantoQuantizer(Quantizer[QuantoConfig]):
    """Absmax per row for 8 bits, the range of each group for fewer.

    Codes are computed in float32 for scales and shifts as they are stored; the peer computes in
    the weight's dtype, which costs accuracy in 16 bits.
    """

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        bits = self.config.bits
        form = abstract_form(
            (target.out_features, target.in_features),
            bits,
            None if bits == 8 else group_size(target.in_features),
            _taken(dtype),
            dtype,
            self._values,
        )
        if self.config.activations is None:
            return form
        one = torch.empty((), dtype=_taken(dtype), device="meta")
        return joined(form, (one, one.clone()))

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        weights, columns = self.block_weights(target, dtype), target.in_features
        if self.config.bits == 8:
            rounding = ByteRounding(self.kernels, self.device, dtype, self._values)
            return rounding.working_bytes(weights, columns, columns)
        coding = CodeRounding(self.kernels, self.device, dtype, self.config.bits)
        return coding.working_bytes(weights, columns, group_size(columns) or columns)

    @property
    def _values(self) -> torch.dtype:
        """Data type of 8-bit weights."""
        kind: torch.dtype = getattr(torch, FLOATS.get(self.config.weights, "int8"))
        return kind

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        form = self._bytes(weight) if self.config.bits == 8 else self._packed(weight)
        if self.config.activations is None:
            return form
        # Without data: as if they were not quantized.
        one = torch.ones((), dtype=_taken(weight.dtype), device=self.device)
        return joined(form, (one, one.clone()))

    def _bytes(self, weight: WeightSource) -> Affine | ScaledFloat:
        rows, columns = weight.shape
        kind = self._values
        real = kind.is_floating_point
        data = torch.empty((rows, columns), dtype=kind, device=self.device)
        scale = torch.empty(rows, dtype=_taken(weight.dtype), device=self.device)
        rounding = ByteRounding(self.kernels, self.device, weight.dtype, kind)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks():
                absmax = rounding.absmax(block, columns)
                finite.look(block, start * columns, maxima=absmax)
                stop = start + block.shape[0]
                part = _positive((absmax / BYTES[kind]).to(scale.dtype))
                scale[start:stop] = part.squeeze(1)
                rounding.store(block, part.to(torch.float32), data[start:stop], columns)
        grouping = grouping_of(columns, None)
        if real:
            return ScaledFloat(data, scale, grouping, dtype=weight.dtype)
        return Affine(Codes(data, 8, (rows, columns), "i8"), scale, grouping, dtype=weight.dtype)

    def _packed(self, weight: WeightSource) -> Affine:
        rows, columns = weight.shape
        bits, dtype = self.config.bits, _taken(weight.dtype)
        size = group_size(columns) or columns
        codes = Codes.empty((rows, columns), bits, "dense", self.device)
        per_row = columns // size
        scale = torch.empty(rows * per_row, dtype=dtype, device=self.device)
        offset = torch.empty_like(scale)
        top = float(2**bits - 1)
        rounding = CodeRounding(self.kernels, self.device, weight.dtype, bits)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks(whole_bytes(columns, bits)):
                least, most = rounding.extremes(block, size)
                finite.look(block, start * columns, maxima=most - least)
                # Divided first: the range of float32 numbers can exceed float32.
                step, low = _positive((most / top - least / top).to(dtype)), least.to(dtype)
                first = start * per_row
                scale[first : first + step.numel()] = step.reshape(-1)
                offset[first : first + step.numel()] = low.reshape(-1)
                wide = step.to(torch.float32)
                out = codes.data.reshape(-1)[start * columns * bits // 8 :]
                rounding.store(block, wide, out, size, minus=low.to(torch.float32) / wide)
        grouping = grouping_of(columns, size)
        groups = grouping.scale_shape((rows, columns))
        return Affine(
            codes,
            scale.reshape(groups),
            grouping,
            offset.reshape(groups),
            "minimum",
            dtype=weight.dtype,
        )


def _positive(scale: Tensor) -> Tensor:
    """Scales; 1 where there is nothing to scale."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
