"""The live layout ``triton``: what the kernels read, and the exact way back to the form.

Codes lie in tiles, each a contiguous piece of memory that a program loads as it is::

    codes   int16 [rows / 64, chunks, words, 64, width]    see quantmill_triton.packing
    high    the same for the upper bits of 3-, 5- and 6-bit codes (2 + 1, 4 + 1, 4 + 2)
    scale   the form's dtype (float8_e8m0fnu as uint8) [groups, rows padded to 64]: a program's
            64 rows of one group are neighbours; [1, 1] per tensor; [blocks, blocks] for blocks.
            A nested scale is expanded to float32, its own tensors are kept beside it.
    pairs   in place of scale, where all zero points are integers from 0 to 127 (8-bit codes: 255):
            int32 of a 16-bit scale's bits and, above them, the zero point; int64 with a float32
            scale. A program loads both at once, wide enough for an asynchronous copy.
    offset  the form's dtype, of scale's shape: any other zero points, or minima
    table   float32 [2**bits]; with 16 entries also ``lut`` int32 [2, 8] and ``unit`` float32 [2]:
            the entries as bytes for byte permutations, in bfloat16 and in float16, and what
            they have to be multiplied by
    order   int32 [columns]: the original column of each sorted one (act-order)
    tail    uint8 [1]: the last byte of packed codes, where codes don't fill it

A form that the registry can't tell from one that fits (a traits' constraint knows neither shapes
nor values) is kept as it is, under names that begin with ``plain.``: kernels then use its
reference. These are flat blocks that cross rows, a group index with groups of unlike size, stacked
weights, an offset on a codebook, offsets that are forms, and unusual dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codebook,
    Codes,
    Flat,
    Form,
    Group,
    PerTensor,
    ScaledFloat,
    value_of,
)
from quantmill_triton.facts import ROWS, Facts, slice_width
from quantmill_triton.packing import pack, unpack, words_shape

__all__ = ["PLAIN", "facts_of", "is_plain", "prepare", "restore"]

PLAIN = "plain."

_PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_OFFSETS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
)
_VALUES = {torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}


def is_plain(tensors: Mapping[str, Tensor]) -> bool:
    """Whether :func:`prepare` kept the form as it was."""
    return "codes" not in tensors


def facts_of(form: Any, tensors: Mapping[str, Tensor] | None = None) -> Facts | None:
    """The facts of a form, or None where the layout can't hold it.

    ``tensors`` are the prepared ones: whether zero points are small integers is seen there, and
    otherwise taken as no.
    """
    if len(form.shape) != 2 or min(form.shape) == 0:
        return None
    rows, columns = form.shape
    grouping = _group_of(form)
    if grouping is None or not _fits(form):
        return None
    group, tall, groups, lanes = grouping
    bits, high = (8, 0) if isinstance(form, ScaledFloat) else _PLANES[_codes(form).bits]
    slices = 16 // (high or bits)
    offset = middle = ordered = values = 0
    if isinstance(form, Affine):
        middle = 128 if form.codes.packing == "i8" else 0
        ordered = int(form.group_index is not None)
        if form.offset_kind == "zero":
            offset = 1 if tensors is not None and "pairs" in tensors else 2
        elif form.offset_kind == "minimum":
            offset = 3
    elif isinstance(form, Codebook):
        values = 1
    elif isinstance(form, ScaledFloat):
        values = _VALUES[form.values.dtype]
    return Facts(
        rows=rows,
        columns=columns,
        bits=bits,
        high_bits=high,
        width=slice_width(slices, group, columns, several=offset > 0),
        slices=slices,
        group=group,
        tall=tall,
        groups=groups,
        lanes=lanes,
        values=values,
        scales=_SCALES.index(form.scale.dtype) if isinstance(form.scale, Tensor) else 0,
        offset=offset,
        middle=middle,
        paired=int(values == 1 and bits == 4),
        ordered=ordered,
    )


def _codes(form: Form) -> Codes:
    assert isinstance(form, Affine | Codebook)
    return form.codes


def _group_of(form: Any) -> tuple[int, int, int, int] | None:
    """Columns and rows that share a scale (0: all of them), and the scale tensor's shape."""
    rows, columns = form.shape
    grouping = form.grouping
    padded = -(-rows // ROWS) * ROWS
    match grouping:
        case PerTensor():
            return 0, 0, 1, 1
        case Channel(axis=0):
            return 0, 1, 1, padded
        case Group(size=size) | Flat(size=size):
            if isinstance(grouping, Flat) and columns % size:
                return None
            return (size, 1, -(-columns // size), padded) if _even(size) else None
        case Blocks(rows=tall, columns=size):
            return (size, tall, -(-columns // size), -(-rows // tall)) if _even(size) else None
    return None


def _even(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def _fits(form: Form) -> bool:
    """Whether dtypes and structure are the layout's, by what shows on the meta device too."""
    assert isinstance(form, Affine | Codebook | ScaledFloat)
    scale = form.scale
    if isinstance(scale, Tensor) and scale.dtype not in _SCALES:
        return False
    if isinstance(form, ScaledFloat):
        return form.values.dtype in _VALUES
    codes = form.codes
    if codes.bits not in _PLANES:
        return False
    if codes.packing == "i8":
        if codes.bits != 8 or not isinstance(form, Affine):
            return False
    elif codes.data.numel() * codes.data.element_size() != _packed_bytes(codes):
        return False
    if isinstance(form, Codebook):
        exact = form.table.dtype == torch.float32 and form.table.numel() == 2**codes.bits
        return exact and form.offset is None and codes.bits in (4, 8)
    if form.group_index is not None and not isinstance(form.grouping, Group):
        return False
    if form.offset is None:
        return form.offset_kind == "none"
    return (
        form.offset_kind in ("zero", "minimum")
        and isinstance(form.offset, Tensor)
        and form.offset.dtype in _OFFSETS
    )


def _packed_bytes(codes: Codes) -> int:
    if codes.packing == "u8":
        return codes.count
    return -(-codes.count * codes.bits // 8)


def prepare(form: Form) -> dict[str, Tensor]:
    """The form in the layout. On the meta device shapes and dtypes are those of a form whose zero
    points are as wide as they are given, so the bytes are the real ones or an upper bound."""
    facts = facts_of(form)
    if facts is None:
        return _plain(form)
    assert isinstance(form, Affine | Codebook | ScaledFloat)
    order = None
    if isinstance(form, Affine) and form.group_index is not None:
        order = _order(form.group_index, facts)
        if order is None:
            return _plain(form)
    tensors = _prepare_codes(form, facts, order)
    scale = _scale_values(form)
    offset = form.offset if isinstance(form, Affine) else None
    assert offset is None or isinstance(offset, Tensor)
    if facts.offset == 2 and offset is not None and _small_integers(offset, scale, facts):
        tensors["pairs"] = _lay(_join_pairs(scale, offset), facts)
    else:
        tensors["scale"] = _lay(scale, facts)
        if offset is not None:
            tensors["offset"] = _lay(offset, facts)
    if isinstance(form.scale, Form):
        tensors.update(form.scale.tensors("scale."))
    if isinstance(form, Codebook):
        tensors["table"] = form.table
        if facts.paired:
            tensors["lut"], tensors["unit"] = _lookup(form.table)
    if order is not None:
        tensors["order"] = order
    return tensors


def restore(tensors: Mapping[str, Tensor], skeleton: Form) -> Form:
    """The form, bit for bit; ``skeleton`` is it on the meta device."""
    if is_plain(tensors):
        return _refill(skeleton, tensors, PLAIN)
    facts = facts_of(skeleton, tensors)
    assert facts is not None
    changes: dict[str, Any] = {}
    codes = unpack(tensors["codes"], facts, facts.bits)
    if facts.high_bits:
        codes |= unpack(tensors["high"], facts, facts.high_bits) << facts.bits
    if facts.ordered:
        order = tensors["order"].to(torch.int64)
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
        assert isinstance(skeleton, Affine) and skeleton.group_index is not None
        index = torch.empty_like(skeleton.group_index, device=codes.device)
        index[order] = (torch.arange(facts.columns, device=codes.device) // facts.group).to(
            index.dtype
        )
        changes["group_index"] = index
    assert isinstance(skeleton, Affine | Codebook | ScaledFloat)
    if isinstance(skeleton, ScaledFloat):
        changes["values"] = codes.view(skeleton.values.dtype)
    else:
        changes["codes"] = _restore_codes(codes, tensors, skeleton.codes)
    scale, offset = tensors.get("scale"), tensors.get("offset")
    if "pairs" in tensors:
        scale, offset = _split_pairs(tensors["pairs"], facts)
    if isinstance(skeleton.scale, Form):
        changes["scale"] = _refill(skeleton.scale, tensors, "scale.")
    else:
        assert scale is not None
        changes["scale"] = _unlay(scale, skeleton.scale, facts)
    if isinstance(skeleton, Affine) and isinstance(skeleton.offset, Tensor):
        assert offset is not None
        changes["offset"] = _unlay(offset, skeleton.offset, facts)
    if isinstance(skeleton, Codebook):
        changes["table"] = tensors["table"]
    return replace(skeleton, **changes)


def _plain(form: Form) -> dict[str, Tensor]:
    return form.tensors(PLAIN)


def _refill(skeleton: Form, tensors: Mapping[str, Tensor], prefix: str) -> Form:
    """A skeleton with the tensors of those paths, in the order that its methods share."""
    names: Iterator[str] = iter(skeleton.tensors(prefix))
    return skeleton.map_tensors(lambda _: tensors[next(names)])


def _prepare_codes(form: Form, facts: Facts, order: Tensor | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    source = form.values if isinstance(form, ScaledFloat) else _codes(form).data
    if source.is_meta:
        planes = {"codes": facts.bits, "high": facts.high_bits}
        for name, bits in planes.items():
            if bits:
                shape = words_shape(facts, bits)
                found[name] = torch.empty(shape, dtype=torch.int16, device="meta")
    else:
        if isinstance(form, ScaledFloat):
            codes = form.values.contiguous().view(torch.uint8)
        else:
            codes = _codes(form).unpack()
            if codes.dtype == torch.int8:
                codes = codes.contiguous().view(torch.uint8) ^ 0x80
        if order is not None:
            codes = codes.index_select(1, order.to(torch.int64))
        found["codes"] = pack(codes, facts, facts.bits, 0)
        if facts.high_bits:
            found["high"] = pack(codes, facts, facts.high_bits, facts.bits)
    if not isinstance(form, ScaledFloat) and _has_tail(_codes(form)):
        # A copy: a view would keep all of the form's bytes alive.
        found["tail"] = source.reshape(-1).view(torch.uint8)[-1:].clone()
    return found


def _has_tail(codes: Codes) -> bool:
    return codes.packing not in ("u8", "i8") and codes.count * codes.bits % 8 != 0


def _restore_codes(codes: Tensor, tensors: Mapping[str, Tensor], skeleton: Codes) -> Codes:
    if skeleton.packing == "i8":
        data = (codes ^ 0x80).view(torch.int8)
    else:
        data = Codes.pack(codes, skeleton.bits, skeleton.packing).data
        if _has_tail(skeleton):
            data.view(-1)[-1:] = tensors["tail"]
    data = data.reshape(-1).view(skeleton.data.dtype).reshape(skeleton.data.shape)
    return replace(skeleton, data=data)


def _order(group_index: Tensor, facts: Facts) -> Tensor | None:
    """Columns sorted by group, int32; None when groups aren't of one size."""
    if group_index.is_meta:
        return torch.empty(facts.columns, dtype=torch.int32, device="meta")
    order = torch.argsort(group_index, stable=True)
    even = torch.arange(facts.columns, device=order.device) // facts.group
    if not torch.equal(group_index[order].to(torch.int64), even):
        return None
    return order.to(torch.int32)


def _scale_values(form: Any) -> Tensor:
    scale: Tensor = value_of(form.scale) if isinstance(form.scale, Form) else form.scale
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _lay(values: Tensor, facts: Facts) -> Tensor:
    """One value per group as ``[groups, lanes]``."""
    rows = facts.lanes if facts.tall != 1 else facts.rows
    laid = values.reshape(rows, facts.groups).t()
    if facts.lanes > rows:
        laid = torch.nn.functional.pad(laid, (0, facts.lanes - rows))
    return laid.contiguous()


def _unlay(laid: Tensor, skeleton: Tensor, facts: Facts) -> Tensor:
    rows = facts.lanes if facts.tall != 1 else facts.rows
    # A clone: what counts as contiguous may have odd strides where a size is 1.
    values = laid[:, :rows].t().clone(memory_format=torch.contiguous_format)
    values = values.reshape(skeleton.shape)
    if skeleton.dtype == torch.float8_e8m0fnu:
        return values.view(skeleton.dtype)
    return values.to(skeleton.dtype)


def _small_integers(zeros: Tensor, scale: Tensor, facts: Facts) -> bool:
    """Whether ``code - zero`` is exact in bfloat16 and the zero fits beside its scale.

    On the meta device: whether that would take more bytes.
    """
    if facts.scales == 3:
        return False
    if zeros.is_meta:
        return scale.element_size() * 2 > scale.element_size() + zeros.element_size()
    top = 255 if facts.bits == 8 and facts.middle == 0 else 127
    wide = zeros.to(torch.float32)
    inside = (wide >= 0) & (wide <= top) & (wide == wide.round()) & ~torch.signbit(wide)
    return bool(inside.all())


def _join_pairs(scale: Tensor, zeros: Tensor) -> Tensor:
    """A scale's bits below, its zero point above, in twice the scale's bits."""
    zeros = zeros.reshape(scale.shape)
    if scale.dtype == torch.float32:
        low = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        return low | (zeros.to(torch.int64) << 32)
    low = scale.view(torch.int16).to(torch.int32) & 0xFFFF
    return low | (zeros.to(torch.int32) << 16)


def _split_pairs(pairs: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
    half, width = (torch.int32, 32) if facts.scales == 0 else (torch.int16, 16)
    # The lower half of each pair, as memory has it: little-endian.
    low = pairs.view(half).reshape(*pairs.shape, 2)[..., 0].contiguous()
    dtype = _SCALES[facts.scales]
    return low.view(dtype), pairs >> width


def _lookup(table: Tensor) -> tuple[Tensor, Tensor]:
    """``lut`` and ``unit`` of a table of 16 entries: low bytes, then high bytes, of each dtype.

    float16 is too narrow for any table, so its entries are scaled by a power of two.
    """
    if table.is_meta:
        return (
            torch.empty((2, 8), dtype=torch.int32, device="meta"),
            torch.empty(2, dtype=torch.float32, device="meta"),
        )
    _, exponent = torch.frexp(table.abs().amax())
    narrow = torch.ldexp(table, -exponent).to(torch.float16)
    rows = []
    for entries in (table.to(torch.bfloat16), narrow):
        pairs = entries.contiguous().view(torch.uint8).reshape(16, 2)
        rows.append(torch.cat([pairs[:, 0].contiguous(), pairs[:, 1].contiguous()]))
    lut = torch.stack(rows).view(torch.int32)
    one = torch.ones((), dtype=torch.float32, device=table.device)
    return lut, torch.stack([one, torch.ldexp(one, exponent)])
