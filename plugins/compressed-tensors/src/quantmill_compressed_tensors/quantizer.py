"""Rounding to nearest, by row blocks, with the scales that the peer takes from a range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from quantmill.backend import Quantizer, WeightSource
from quantmill.findings import Finding, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Blocks, Channel, Codes, Form, Group, Grouping, PerTensor
from quantmill.forms.rows import take_lowest, whole_bytes
from quantmill.rounding import ByteRounding, CodeRounding
from quantmill.targeting.types import Target
from quantmill_compressed_tensors.config import CompressedConfig
from quantmill_compressed_tensors.forms import (
    Layout,
    StoredAffine,
    StoredFloat,
    abstract_float,
    abstract_integer,
)
from quantmill_compressed_tensors.fp4 import (
    E8M0,
    FP4,
    STYLES,
    StoredFp4,
    abstract_fp4,
    fp4_working_bytes,
    quantize_fp4,
)
from quantmill_compressed_tensors.schemes import Args, Scheme

__all__ = ["CompressedQuantizer"]

UNEVEN = declare("QM-CT-002", "A module's width is no multiple of the group size")
TOP = 448.0
"""The largest finite float8_e4m3fn."""


class CompressedQuantizer(Quantizer[CompressedConfig]):
    """Integers of 2 to 8 bits, and FP8 (e4m3)."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        return self._empty(target, dtype)

    def check(self, target: Target) -> Iterator[Finding]:
        args = self._args(target)
        size = args.group_size or 0
        if args.means in ("group", "tensor_group") and target.in_features % size:
            yield UNEVEN(
                target.name,
                f"its width {target.in_features} is no multiple of group_size={size}, and the"
                " format has no ragged groups",
                f"take another group_size, or keep it float: --skip {target.name}",
            )

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        form, weights = self._empty(target, dtype), self.block_weights(target, dtype)
        if isinstance(form, StoredFp4):
            return fp4_working_bytes(form, weights, self._pairs(dtype))
        columns = target.in_features
        if _in_bytes(form):
            group = form.grouping.size if isinstance(form.grouping, Group) else columns
            values = form.values if isinstance(form, StoredFloat) else form.codes.data
            rounding = ByteRounding(self.kernels, self.device, dtype, values.dtype)
            return rounding.working_bytes(weights, columns, group)
        if isinstance(form, StoredAffine) and _in_codes(form):
            group = form.grouping.size if isinstance(form.grouping, Group) else columns
            coding = CodeRounding(self.kernels, self.device, dtype, form.codes.bits)
            return coding.working_bytes(weights, columns, group)
        # Of a row block: it in float32, and scales for each weight; or codes on their way to bytes.
        work = 4 * weights
        if isinstance(form.grouping, Group):
            work = 8 * weights
        elif isinstance(form.grouping, Blocks):
            work = 20 * weights  # To find the ranges, the number of its block for each weight.
        if isinstance(form, StoredAffine) and form.layout.packed:
            work = max(work, 5 * weights + Codes.packing_bytes(weights, form.codes.bits))
        scales = weights * prod(form.grouping.scale_shape(form.shape)) // max(1, target.weights)
        return work + 28 * scales

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        form = self._empty(target, weight.dtype)
        if isinstance(form, StoredFp4):
            return quantize_fp4(form, weight, self._pairs(weight.dtype))
        args = self._args(target)
        real = form.map_tensors(lambda item: torch.empty_like(item, device=self.device))
        if _in_bytes(real):
            self._round_bytes(real, weight)
            return real
        if isinstance(real, StoredAffine) and _in_codes(real):
            self._round_codes(real, weight, args)
            return real
        whole = None
        if isinstance(real.grouping, PerTensor):
            whole = self._range(weight)
        with FiniteCheck(weight.name) as finite:
            for start, rows in weight.row_blocks(_step(real)):
                work = rows.to(torch.float32, copy=True)
                finite.look(work, start * target.in_features)
                _fill_rows(real, start, work, whole, args)
                # The next rows must not be read beside these.
                del work
        return real

    def _round_bytes(self, form: StoredAffine | StoredFloat, weight: WeightSource) -> None:
        columns = form.shape[1]
        group = form.grouping.size if isinstance(form.grouping, Group) else columns
        real = isinstance(form, StoredFloat)
        out = form.values if isinstance(form, StoredFloat) else form.codes.data.reshape(form.shape)
        rounding = ByteRounding(self.kernels, self.device, weight.dtype, out.dtype)
        assert isinstance(form.scale, Tensor)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks():
                absmax = rounding.absmax(block, group)
                finite.look(block, start * columns, maxima=absmax)
                # As the peer: integers have the whole range, and the top code is clamped.
                scale = _scale(absmax / (TOP if real else 127.5), form.scale.dtype)
                _put(form.scale, start, form.grouping, scale)
                part = out[start : start + block.shape[0]]
                rounding.store(block, scale.to(torch.float32), part, group)

    def _round_codes(self, form: StoredAffine, weight: WeightSource, args: Args) -> None:
        columns, bits = form.shape[1], form.codes.bits
        group = form.grouping.size if isinstance(form.grouping, Group) else columns
        middle = 2 ** (bits - 1)
        rounding = CodeRounding(self.kernels, self.device, weight.dtype, bits)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks(_step(form)):
                if args.symmetric:
                    high = rounding.absmax(block, group)
                    low = -high
                else:
                    low, high = rounding.extremes(block, group)
                finite.look(block, start * columns, maxima=high - low)
                low, high = low.clamp(max=0), high.clamp(min=0)
                scale, zero = _rule(form, start, low, high, args)
                rounding.store(
                    block,
                    scale.to(torch.float32),
                    form.codes.data.reshape(-1)[start * columns * bits // 8 :],
                    group,
                    plus=zero,
                    middle=middle,
                    lowest=args.symmetric and bits < 4,
                )

    def _pairs(self, dtype: torch.dtype) -> ByteRounding:
        return ByteRounding(self.kernels, self.device, dtype, FP4)

    def _args(self, target: Target) -> Args:
        group = self._group(target)
        return group.weights if group.weights is not None else Args()

    def _group(self, target: Target) -> Scheme:
        found = self.config.scheme_of(target)
        return found if found is not None else next(iter(self.config.config_groups.values()))

    def _empty(self, target: Target, dtype: torch.dtype) -> StoredAffine | StoredFloat | StoredFp4:
        """The form on the meta device. Scales have the dtype of the weight, as the peer's."""
        args, shape = self._args(target), (target.out_features, target.in_features)
        if args.type == "float" and args.num_bits == 4:
            style = "mxfp4-pack-quantized" if args.group_size == 32 else "nvfp4-pack-quantized"
            columns = -(-shape[1] // STYLES[style].group) * STYLES[style].group
            return abstract_fp4((shape[0], columns), style, dtype)
        dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        grouping: Grouping = {
            "tensor": PerTensor(),
            "group": Group(args.group_size or 1),
            "block": Blocks(*(args.block or (1, 1))),
        }.get(args.means, Channel(0))
        size = grouping.scale_shape(shape)
        stored = {0: (1,), 1: (shape[0], 1)}.get(len(size), size)
        if args.type == "float":
            powers = self._group(target).stores_as == "mxfp8-quantized"
            layout = Layout(False, stored, exponents=powers)
            kind = E8M0 if powers else dtype
            return abstract_float(shape, torch.float8_e4m3fn, grouping, layout, kind, dtype)
        packed = self._group(target).stores_as == "pack-quantized"
        layout = Layout(packed, stored)
        if not args.symmetric:
            plain = not packed or isinstance(grouping, PerTensor)
            layout = replace(layout, zeros="plain" if plain else "packed")
            layout = replace(layout, zeros_shape=stored if plain else None)
        bits = args.num_bits if packed else 8
        return abstract_integer(shape, bits, grouping, layout, dtype, dtype)

    def _range(self, weight: WeightSource) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the whole weight, in a pass of its own."""
        low = high = torch.zeros((), dtype=torch.float32, device=self.device)
        for _, rows in weight.row_blocks():
            least, most = rows.to(torch.float32).aminmax()
            low, high = torch.minimum(low, least), torch.maximum(high, most)
        return low, high


def _in_bytes(form: StoredAffine | StoredFloat) -> bool:
    """Symmetric bytes with scales by rows or groups: kernels round those."""
    if not isinstance(form.grouping, Channel | Group):
        return False
    if isinstance(form, StoredFloat):
        return True
    return form.codes.packing == "i8" and form.offset is None and form.codes.bits == 8


def _in_codes(form: StoredAffine) -> bool:
    """Packed codes with scales by rows or groups: the same."""
    return form.layout.packed and isinstance(form.grouping, Channel | Group)


def _step(form: StoredAffine | StoredFloat) -> int:
    """Rows that end where a byte of codes and a block of scales end."""
    if isinstance(form.grouping, Blocks):
        return form.grouping.rows
    if isinstance(form, StoredAffine) and form.layout.packed:
        return whole_bytes(form.shape[1], form.codes.bits)
    return 1


def _reduced(work: Tensor, grouping: Grouping) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group, widened to zero."""
    low, high = grouping.reduce(work, "amin"), grouping.reduce(work, "amax")
    return low.clamp(max=0), high.clamp(min=0)


def _scale(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: rounded, finite, not zero."""
    if dtype == E8M0:
        # The next power of two, from the bits: a logarithm could miss an exact one.
        mantissa, exponent = torch.frexp(values)
        power = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-127, 127)
        return torch.where(values > 0, power + 127, 127).to(torch.uint8).view(E8M0)
    top = torch.finfo(dtype)
    scale = values.clamp(max=top.max).to(dtype)
    return torch.where(scale == 0, torch.tensor(top.eps, dtype=dtype, device=scale.device), scale)


def _put(whole: Tensor, start: int, grouping: Grouping, part: Tensor) -> None:
    """Write the scales or zero points of the rows from ``start`` on."""
    if isinstance(grouping, PerTensor):
        whole.copy_(part)
        return
    first = start // grouping.rows if isinstance(grouping, Blocks) else start
    if whole.dtype == E8M0:
        whole, part = whole.view(torch.uint8), part.view(torch.uint8)
    whole[first : first + part.shape[0]] = part.reshape(-1, *whole.shape[1:])


def _fill_rows(
    form: StoredAffine | StoredFloat,
    start: int,
    work: Tensor,
    whole: tuple[Tensor, Tensor] | None,
    args: Args,
) -> None:
    """Round the rows from ``start``, float32, which are changed; ``whole`` is the weight's range
    where it has one scale."""
    low, high = whole if whole is not None else _reduced(work, form.grouping)
    if isinstance(form, StoredFloat):
        _float_rows(form, start, work, low, high)
    else:
        _integer_rows(form, start, work, low, high, args)


def _float_rows(form: StoredFloat, start: int, work: Tensor, low: Tensor, high: Tensor) -> None:
    assert isinstance(form.scale, Tensor)
    scale = _scale(torch.maximum(-low, high) / TOP, form.scale.dtype)
    _put(form.scale, start, form.grouping, scale)
    # Scales for each weight must not outlive the division: they are as large as the rows.
    work.div_(form.grouping.expand(scale.to(torch.float32), tuple(work.shape)))
    form.values[start : start + work.shape[0]].copy_(work.clamp_(-TOP, TOP))


def _rule(
    form: StoredAffine, start: int, low: Tensor, high: Tensor, args: Args
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points where they are not 0, of the ranges of groups from row ``start`` on;
    both are written into the form."""
    assert isinstance(form.scale, Tensor)
    least, most = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    kind, zero = form.scale.dtype, None
    if args.symmetric:
        # As the peer: the range is divided by its whole length, and its top code is clamped.
        scale = _scale(torch.maximum(-low, high) / ((most - least) / 2), kind)
    else:
        scale = _scale((high - low) / (most - least), kind)
        zero = torch.round((least - low / scale.to(torch.float32)).clamp(least, most))
    _put(form.scale, start, form.grouping, scale)
    if isinstance(form.offset, Tensor):
        shift = torch.zeros_like(low) if zero is None else zero
        middle = -least if form.layout.packed else 0
        _put(form.offset, start, form.grouping, (shift + middle).to(form.offset.dtype))
    return scale, zero


def _integer_rows(
    form: StoredAffine, start: int, work: Tensor, low: Tensor, high: Tensor, args: Args
) -> None:
    least, most = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    shape = tuple(work.shape)
    scale, zero = _rule(form, start, low, high, args)
    scaled = work.div_(form.grouping.expand(scale.to(torch.float32), shape))
    if args.symmetric and args.num_bits < 4:
        take_lowest(scaled, least)
    codes = scaled.round_()
    if zero is not None:
        codes.add_(form.grouping.expand(zero, shape))
    codes = codes.clamp_(least, most)
    if not form.layout.packed:
        form.codes.data[start : start + shape[0]].copy_(codes)
        return
    data = Codes.pack(codes.sub_(least).to(torch.uint8), form.codes.bits, "dense").data
    first = start * shape[1] * form.codes.bits // 8
    form.codes.data[first : first + data.numel()] = data
