"""Quantizes to torchao's tensors, streaming by row blocks.

The rules are torchao's (``choose_qparams_affine``, ``_choose_scale_float8``), computed in float32
for scales as they are stored: torchao computes in the weight's dtype, which costs accuracy in 16
bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from quantmill.backend import Quantizer, WeightSource
from quantmill.findings import Finding, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Codes, Form, PerTensor
from quantmill.forms.rows import take_lowest
from quantmill.rounding import BYTES, ByteRounding, CodeRounding
from quantmill.targeting.types import Target
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.forms import AoAffine, AoFloat, Layout, abstract_affine, abstract_float
from quantmill_torchao.notes import note_for
from quantmill_torchao.recipes import Recipe

__all__ = ["TorchaoQuantizer"]

UNEVEN = declare("QM-TORCHAO-010", "A weight's shape does not fit torchao's tensor")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TINY = torch.finfo(torch.float32).eps
"""torchao's least scale of int8."""
_LEAST = 1e-6
"""FBGEMM's least range of an int4 group."""
_ROUNDS = 20
"""Most iterations of the search for scales."""


class TorchaoQuantizer(Quantizer[TorchaoConfig]):
    """Scales from ranges; for ``HQQ_SCALE_ONLY`` by least squares."""

    @property
    def recipe(self) -> Recipe:
        """What the config means."""
        return self.config.recipe

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        return self._empty((target.out_features, target.in_features), dtype)

    def check(self, target: Target) -> Iterator[Finding]:
        recipe, shape = self.recipe, (target.out_features, target.in_features)
        block = recipe.grain.block(shape)
        problem = ""
        if shape[0] % block[0] or shape[1] % block[1]:
            problem = f"blocks of {block[0]} x {block[1]} do not divide it"
        elif recipe.tensor == "Int4Tensor" and shape[1] % 2:
            problem = "int4 codes lie in pairs, and its width is odd"
        elif recipe.tensor == "Float8Tensor" and recipe.inputs and (shape[0] % 16 or shape[1] % 16):
            problem = "float8 matrix products need multiples of 16"
        if problem:
            yield UNEVEN(
                target.name,
                f"it is {shape[0]} x {shape[1]}, and {problem}",
                f"take another granularity, or keep it float: --skip {target.name}",
            )

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        form = self._empty((target.out_features, target.in_features), dtype)
        weights, columns = self.block_weights(target, dtype), target.in_features
        rows, width = form.layout.block
        small = isinstance(form, AoAffine) and form.codes.packing == "dense"
        if self._by_rows(form):
            if isinstance(form, AoAffine) and small:
                coding = CodeRounding(self.kernels, self.device, dtype, form.codes.bits)
                return coding.working_bytes(weights, columns, width)
            kind = form.values.dtype if isinstance(form, AoFloat) else torch.int8
            rounding = ByteRounding(self.kernels, self.device, dtype, kind)
            return rounding.working_bytes(weights, columns, width)
        # Of a row block: it in float32, and its codes and their packing; a search tries some more.
        work = 4 * weights
        if isinstance(form, AoAffine) and small:
            work = 5 * weights + Codes.packing_bytes(weights, form.codes.bits)
        if self.recipe.algorithm == "HQQ_SCALE_ONLY":
            work = 16 * weights
        return work + 28 * (weights // max(1, rows * width))

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        shape = (target.out_features, target.in_features)
        form = self._empty(shape, weight.dtype)
        form = form.map_tensors(lambda item: torch.empty_like(item, device=self.device))
        # A block of rows ends where a byte of codes and a block of scales end.
        step = form.layout.block[0] if not isinstance(form.grouping, PerTensor) else 1
        if isinstance(form, AoAffine) and form.codes.packing == "dense":
            period = 8 // gcd(8, shape[1] * form.codes.bits)
            step = step * period // gcd(step, period)
        if self._by_rows(form):
            if isinstance(form, AoFloat) or form.codes.packing == "i8":
                self._round_bytes(form, weight, step)
            else:
                self._round_codes(form, weight, step)
            return form
        whole = self._range(weight) if isinstance(form.grouping, PerTensor) else None
        with FiniteCheck(weight.name) as finite:
            for start, rows in weight.row_blocks(step):
                self._fill(form, start, rows, whole, finite)
        return form

    def _fill(
        self,
        form: AoAffine | AoFloat,
        start: int,
        rows: Tensor,
        whole: tuple[Tensor, Tensor] | None,
        finite: FiniteCheck,
    ) -> None:
        """Round the rows from ``start``; ``whole`` is the weight's range where it has one scale."""
        work = rows.to(torch.float32, copy=True)
        tiles, low, high = _tiled(work, form.layout.block, whole)
        finite.look(rows, start * form.shape[1], maxima=high - low)
        if isinstance(form, AoFloat):
            self._floats(form, start, tiles, low, high)
        else:
            self._integers(form, start, tiles, low, high)

    def _by_rows(self, form: AoAffine | AoFloat) -> bool:
        """Scales of ranges of rows or groups, of a rule that kernels round by."""
        if isinstance(form.grouping, PerTensor) or form.layout.block[0] != 1:
            return False
        if isinstance(form, AoFloat) or form.layout.tensor == "Int8Tensor":
            return True
        rule = self.recipe.algorithm != "HQQ_SCALE_ONLY" and form.layout.tensor != "Int4Tensor"
        return rule and form.codes.packing == "dense"

    def _round_bytes(self, form: AoAffine | AoFloat, weight: WeightSource, step: int) -> None:
        columns, group = form.shape[1], form.layout.block[1]
        assert isinstance(form.scale, Tensor)
        if isinstance(form, AoFloat):
            out, top = form.values, BYTES[form.values.dtype]
        else:
            out, top = form.codes.data, 127.0
        if self.recipe.reduced:
            top = top // 2
        rounding = ByteRounding(self.kernels, self.device, weight.dtype, out.dtype)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks(step):
                absmax = rounding.absmax(block, group)
                finite.look(block, start * columns, maxima=absmax)
                real = isinstance(form, AoFloat)
                if real:
                    scale = by = _float_scale(absmax, top)
                else:
                    scale = self._stored(form, absmax / (top + 0.5))
                    by = 1.0 / scale.to(torch.float32)
                _put(form, form.scale, start, scale)
                part = out[start : start + block.shape[0]]
                rounding.store(block, by, part, group, multiply=not real, top=top)

    def _round_codes(self, form: AoAffine, weight: WeightSource, step: int) -> None:
        columns, group, bits = form.shape[1], form.layout.block[1], form.codes.bits
        mapping, (least, most) = self.recipe.mapping, self._limits(bits)
        middle = 2 ** (bits - 1)
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        rounding = CodeRounding(self.kernels, self.device, weight.dtype, bits)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks(step):
                if mapping == "SYMMETRIC":
                    high = rounding.absmax(block, group)
                    low = -high
                else:
                    low, high = rounding.extremes(block, group)
                finite.look(block, start * columns, maxima=high - low)
                scale, zero = self._scale(form, low, high)
                _put(form, form.scale, start, scale)
                shift = torch.full_like(low, middle) if zero is None else zero + middle
                _put(form, form.offset, start, shift.to(form.offset.dtype))
                rounding.store(
                    block,
                    1.0 / scale.to(torch.float32),
                    form.codes.data.reshape(-1)[start * columns * bits // 8 :],
                    group,
                    plus=zero,
                    multiply=True,
                    middle=middle,
                    limits=(int(least) + middle, int(most) + middle),
                    lowest=mapping == "SYMMETRIC" and 1 < bits < 4,
                )

    def _limits(self, bits: int) -> tuple[float, float]:
        """The least and the largest signed code."""
        least, most = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        return (least // 2, most // 2) if self.recipe.reduced else (least, most)

    def _scale(self, form: AoAffine, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales as they are stored, and zero points where they are not 0, of ranges."""
        mapping, (least, most) = self.recipe.mapping, self._limits(form.codes.bits)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if mapping == "SYMMETRIC":
            return self._stored(form, torch.maximum(high, -low) / ((most - least) / 2)), None
        if mapping == "SYMMETRIC_NO_CLIPPING_ERR":
            return self._stored(form, torch.maximum(low / least, high / max(most, 1.0))), None
        scale = self._stored(form, (high - low) / max(most - least, 1.0))
        return scale, (least - torch.round(low / scale.to(torch.float32))).clamp(least, most)

    def _stored(self, form: AoAffine | AoFloat, scale: Tensor) -> Tensor:
        """Scales in the dtype of the form, none of them zero."""
        assert isinstance(form.scale, Tensor)
        floor = _TINY if self.recipe.tensor == "Int8Tensor" else torch.finfo(form.scale.dtype).tiny
        return scale.clamp(min=floor).to(form.scale.dtype)

    def _empty(self, shape: tuple[int, int], dtype: torch.dtype) -> AoAffine | AoFloat:
        recipe = self.recipe
        kind = dtype if dtype in _FLOATS else torch.float32
        block = recipe.grain.block(shape)
        if shape[0] % block[0] or shape[1] % block[1]:
            block = (1, shape[1])  # check() says so; a plan counts bytes all the same
        note = note_for(recipe, shape, kind)
        if recipe.tensor == "Float8Tensor":
            values: torch.dtype = getattr(torch, recipe.values)
            return abstract_float(shape, values, Layout(recipe.tensor, block, None, note), dtype)
        layout = Layout(recipe.tensor, block, torch.int8, note)
        if recipe.tensor == "Int8Tensor":
            return abstract_affine(shape, 8, layout, torch.float32, dtype)
        if recipe.tensor == "Int4Tensor":
            return abstract_affine(shape, 4, replace(layout, zero=kind), kind, dtype)
        scale = getattr(torch, recipe.scale_dtype) if recipe.scale_dtype else kind
        uneven = recipe.mapping == "ASYMMETRIC"
        return abstract_affine(shape, recipe.bits, layout, scale, dtype, zeros=uneven)

    def _range(self, weight: WeightSource) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the whole weight, in a pass of its own."""
        low = high = torch.zeros((), dtype=torch.float32, device=self.device)
        with FiniteCheck(weight.name) as finite:
            for start, rows in weight.row_blocks():
                least, most = rows.to(torch.float32).aminmax()
                finite.look(rows, start * weight.shape[1], maxima=most - least)
                low, high = torch.minimum(low, least), torch.maximum(high, most)
        return low, high

    def _floats(self, form: AoFloat, start: int, tiles: Tensor, low: Tensor, high: Tensor) -> None:
        top = torch.finfo(form.values.dtype).max
        scale = _float_scale(torch.maximum(high, -low), top)
        assert isinstance(form.scale, Tensor)
        _put(form, form.scale, start, scale)
        values = tiles.div_(scale).clamp_(-top, top).reshape(-1, form.shape[1])
        form.values[start : start + values.shape[0]].copy_(values)

    def _integers(
        self, form: AoAffine, start: int, tiles: Tensor, low: Tensor, high: Tensor
    ) -> None:
        recipe, bits = self.recipe, form.codes.bits
        if form.layout.tensor == "Int4Tensor":
            self._int4(form, start, tiles, low, high)
            return
        assert isinstance(form.scale, Tensor)
        least, most = self._limits(bits)
        zero: Tensor | None = None
        if recipe.algorithm == "HQQ_SCALE_ONLY":
            scale = self._stored(
                form, _least_squares(tiles, torch.maximum(high, -low), least, most)
            )
        else:
            scale, zero = self._scale(form, low, high)
        wide = scale.to(torch.float32)
        _put(form, form.scale, start, scale)
        scaled = tiles.mul_(1.0 / wide)
        if recipe.mapping == "SYMMETRIC" and 1 < bits < 4:
            take_lowest(scaled, least)
        codes = scaled.round_()
        if zero is not None:
            codes = codes.add_(zero)
        codes = codes.clamp_(least, most).reshape(-1, form.shape[1])
        if form.codes.packing == "i8":
            form.codes.data[start : start + codes.shape[0]].copy_(codes)
            if isinstance(form.offset, Tensor):
                assert zero is not None
                _put(form, form.offset, start, zero.to(torch.int8))
            return
        middle = 2 ** (bits - 1)
        assert isinstance(form.offset, Tensor)
        shift = torch.full_like(wide, middle) if zero is None else zero + middle
        _put(form, form.offset, start, shift.to(form.offset.dtype))
        _pack(form, start, codes.add_(middle))

    def _int4(self, form: AoAffine, start: int, tiles: Tensor, low: Tensor, high: Tensor) -> None:
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        assert form.float_zero is not None
        kind = form.scale.dtype
        if self.recipe.mapping == "SYMMETRIC":
            scale = (torch.maximum(high, -low).clamp(min=_LEAST) / 8).to(kind)
            zero = torch.zeros_like(scale)
        else:
            scale = ((high / 15 - low / 15).clamp(min=_LEAST / 15)).to(kind)
            zero = (low + 8 * scale.to(torch.float32)).to(kind)
        wide = scale.to(torch.float32)
        least = zero.to(torch.float32) - 8 * wide
        rows = tiles.shape[0]
        form.float_zero[:, start : start + rows] = zero.reshape(rows, -1).t()
        _put(form, form.scale, start, scale)
        _put(form, form.offset, start, least)
        codes = tiles.sub_(least).div_(wide).round_().clamp_(0, 15)
        _pack(form, start, codes.reshape(rows, -1))


def _float_scale(absmax: Tensor, top: float) -> Tensor:
    scale = absmax / top
    # A scale of 0 would make 0 / 0: zeros have the scale 1.
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _tiled(
    work: Tensor, block: tuple[int, int], whole: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as ``[row blocks, b0, column blocks, b1]``, with the range of each block beside them,
    shaped to broadcast."""
    if whole is not None:
        low, high = (item.reshape(1, 1, 1, 1) for item in whole)
        return work[:, None, None, :], low, high
    rows, columns = block
    tiles = work.reshape(work.shape[0] // rows, rows, work.shape[1] // columns, columns)
    axes = 3 if rows == 1 else (1, 3)
    return tiles, tiles.amin(dim=axes, keepdim=True), tiles.amax(dim=axes, keepdim=True)


def _put(form: AoAffine | AoFloat, whole: Tensor, start: int, part: Tensor) -> None:
    """Set the scales (or zero points) of a block of rows from ``start``."""
    if whole.ndim == 0:
        whole.copy_(part.reshape(()))
        return
    first = start // form.layout.block[0]
    whole[first : first + part.shape[0]] = part.reshape(part.shape[0], *whole.shape[1:])


def _pack(form: AoAffine, start: int, codes: Tensor) -> None:
    packed = Codes.pack(codes.to(torch.uint8), form.codes.bits, "dense").data.reshape(-1)
    begin = start * form.shape[1] * form.codes.bits // 8
    form.codes.data.reshape(-1)[begin : begin + packed.numel()] = packed


def _least_squares(tiles: Tensor, absmax: Tensor, least: float, most: float) -> Tensor:
    """Scales by alternation: codes for a scale, then the scale that fits them best."""
    scale = (absmax / max(-least, most)).clamp(min=_TINY)
    for _ in range(_ROUNDS):
        codes = torch.round(tiles / scale).clamp_(least, most)
        over = (tiles * codes).sum(dim=3, keepdim=True)
        under = (codes * codes).sum(dim=3, keepdim=True)
        found = torch.where(under > 0, over / under, scale).abs().clamp(min=_TINY)
        if bool(((found - scale).abs() <= 1e-5 * scale).all()):
            return found
        scale = found
    return scale
