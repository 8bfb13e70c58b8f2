"""The live layout ``cpu-panels``: forms as the native matmul wants them, and back, bit for bit.

Panels of 16 rows hold the codes as planes (``c/matmul.h`` draws them); scales and offsets lie
before them group by group, 16 rows at a time, all in one tensor ``weight``. What the kernel has no
use for, or reads in another form, stays as it is beside it, as ``form.NAME``. A form that doesn't
fit (:func:`misfit`) is kept whole that way, and is computed with the reference: constraints of
kernels can't ask for everything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import lru_cache

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
)
from quantmill_cpu.codes import PACKINGS, panels_of, panels_size, panels_to
from quantmill_cpu.values import Stored, from_panels, store
from quantmill_cpu.weight import Spec, assemble, finish, parts_of

__all__ = ["misfit", "prepare", "restore"]

_OFFSETS = {"none": 0, "zero": 1, "minimum": 2}
_BITS = (1, 2, 3, 4, 5, 6, 8)
_UNIT = 16


def _codes(form: Form) -> Codes:
    """The form's codes; the bytes of 8-bit floats are codes too."""
    if isinstance(form, ScaledFloat):
        values = form.values
        data = values if values.is_meta else values.view(torch.uint8)
        return Codes(data, 8, form.shape, "u8")
    assert isinstance(form, Affine | Codebook)
    return form.codes


def _columns(form: Form) -> int:
    """Columns in a group, as many as the kernel has scales of a row for."""
    assert isinstance(form, Affine | Codebook | ScaledFloat)
    grouping, width = form.grouping, form.shape[1]
    if isinstance(grouping, Group | Flat):
        return grouping.size
    if isinstance(grouping, Blocks):
        return grouping.columns
    return -(-width // _UNIT) * _UNIT


def misfit(form: Form) -> str | None:
    """Why a form has no panels, or None. What is asked of data can't be asked on ``meta``."""
    if not isinstance(form, Affine | Codebook | ScaledFloat):
        return f"the form {form.kind}"
    if len(form.shape) != 2 or 0 in form.shape:
        return f"the shape {list(form.shape)}"
    codes, grouping = _codes(form), form.grouping
    if isinstance(form, ScaledFloat) and form.values.element_size() != 1:
        return f"values of {form.values.dtype}"
    if codes.bits not in _BITS or codes.packing not in PACKINGS:
        return f"{codes.bits} bits in {codes.packing}"
    if codes.nbytes != Codes.empty(codes.shape, codes.bits, codes.packing, "meta").nbytes:
        return "more bytes than codes"
    if isinstance(form, Codebook) and form.table.numel() != 2**codes.bits:
        return f"a table of {form.table.numel()} entries"
    if not isinstance(grouping, Group | Flat | Blocks | PerTensor) and grouping != Channel(0):
        return f"the grouping {grouping}"
    if isinstance(grouping, Flat) and form.shape[1] % grouping.size:
        return f"blocks of {grouping.size} that cross rows of {form.shape[1]}"
    if isinstance(form, Affine) and form.group_index is not None:
        if not isinstance(grouping, Group):
            return f"a group index with {grouping}"
        if not form.group_index.is_meta and _order(form.group_index, grouping.size) is None:
            return "groups of unequal sizes in the group index"
    if _columns(form) % _UNIT and _columns(form) < form.shape[1]:
        return f"groups of {_columns(form)} columns"
    return None


def _order(index: Tensor, size: int) -> Tensor | None:
    """Columns sorted by group, where these are groups of ``size`` and a last one."""
    if index.is_meta:
        return torch.empty(index.numel(), dtype=torch.int32, device="meta")
    order = torch.argsort(index.to(torch.int64), stable=True)
    even = torch.arange(index.numel()) // size
    return order.to(torch.int32) if torch.equal(index.to(torch.int64)[order], even) else None


@lru_cache(maxsize=256)
def _rounding(entries: tuple[float, ...]) -> float:
    """A factor with which a table loses little in bfloat16: its error is the same for all
    weights of a code, so it doesn't average out."""
    table = torch.tensor(entries, dtype=torch.float64)
    table = torch.where(table.isfinite(), table, 0.0)
    factors = torch.cat([torch.ones(1), 2 ** (torch.arange(1, 512) / 512)]).double().unsqueeze(1)
    scaled = factors * table
    wrong = ((scaled.to(torch.bfloat16).double() - scaled) / factors).square().sum(dim=1)
    return float(factors[wrong.argmin()])


def _lookup(form: Form) -> tuple[Tensor, float, float, float]:
    """Values of the codes ``[2**bits]``; gain, shift and the constant of all values."""
    codes = _codes(form)
    count = 2**codes.bits
    if isinstance(form, Affine):
        # Around zero, so that little is taken away in the end; whole numbers, exact in bfloat16.
        middle = float(count // 2)
        shift = 0.0 if codes.packing == "i8" else middle
        return torch.arange(count, dtype=torch.float32) - middle, form.factor, shift, 0.0
    if isinstance(form, ScaledFloat):
        patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(form.values.dtype)
        return patterns.to(torch.float32), 1.0, 0.0, 0.0
    assert isinstance(form, Codebook)
    factor = _rounding(tuple(form.table.to(torch.float32).reshape(-1).tolist()))
    plus = 0.0 if form.offset is None else float(form.offset)
    return form.table.to(torch.float32).reshape(-1) * factor, 1.0 / factor, 0.0, plus


def _same_zero(form: Form) -> Tensor | None:
    """The zero point ``[1]`` where all groups have the same one, as in every symmetric format."""
    if not isinstance(form, Affine) or form.offset_kind != "zero":
        return None
    offset = form.offset
    if not isinstance(offset, Tensor) or offset.itemsize > 4:
        return None
    if offset.is_meta:
        return None if any(offset.stride()) else offset.new_empty(1)
    flat = offset.contiguous().reshape(-1)
    if not bool(flat[0].isfinite()) or not _all_same(flat):
        return None
    return flat[:1].clone()


def _all_same(flat: Tensor) -> bool:
    """Whether all elements have the same bits."""
    size = flat.itemsize
    if flat.device.type != "cpu":
        whole = flat.view(torch.uint8).reshape(-1, size)
        return bool((whole == whole[0]).all())
    # Each its neighbour; not by PyTorch, whose threads go on spinning where others have work.
    start, count = flat.data_ptr(), (flat.numel() - 1) * size
    return ctypes.string_at(start, count) == ctypes.string_at(start + size, count)


def prepare(form: Form) -> dict[str, Tensor]:
    """The form in panels, as ``weight``, and what these lack; on the meta device only the sizes."""
    if misfit(form) is not None:
        return {f"form.{name}": tensor for name, tensor in form.tensors().items()}
    assert isinstance(form, Affine | Codebook | ScaledFloat)
    codes = _codes(form)
    device = codes.data.device
    size = _columns(form)
    scale = store(form.scale, form.grouping, form.shape, "scale")
    offset, kind = Stored(), "none"
    kept: dict[str, Tensor] = {}
    same = _same_zero(form)
    if same is not None:
        kept["offset_value"] = same
    elif isinstance(form, Affine) and form.offset is not None and form.offset_kind != "none":
        offset, kind = store(form.offset, form.grouping, form.shape, "offset"), form.offset_kind
    elif isinstance(form, Affine) and isinstance(form.offset, Form):
        kept |= {f"form.offset.{name}": tensor for name, tensor in form.offset.tensors().items()}
    elif not isinstance(form, ScaledFloat) and isinstance(form.offset, Tensor):
        kept["form.offset"] = form.offset
    parts = {**scale.parts, **offset.parts}
    kept |= {**scale.kept, **offset.kept}
    order: Tensor | None = None
    if isinstance(form, Affine) and form.group_index is not None:
        order = _order(form.group_index, size)
        if order is not None:
            parts["order"] = order
    if isinstance(form, Codebook):
        kept["form.table"] = form.table
    if codes.count * _width(codes) % 8:
        # Nobody says what the unused bits of the last byte are.
        kept["form.last_byte"] = codes.data.reshape(-1).view(torch.uint8)[-1:].clone()
    bytes_of_codes = panels_size(form.shape, codes.bits)
    if device.type == "meta":
        parts["lookup"] = torch.empty(2**codes.bits, device=device)
        return {"weight": assemble(Spec((), ()), parts, bytes_of_codes, device), **kept}
    lookup, gain, shift, plus = _lookup(form)
    if same is not None:
        shift -= float(same)
    parts["lookup"] = lookup
    spec = Spec(
        (*form.shape, codes.bits, size, _OFFSETS[kind], *scale.spec, *offset.spec),
        (gain, shift, plus, *scale.constants, *offset.constants),
    )
    weight = assemble(spec, parts, bytes_of_codes, device)
    # Padding must be finite: zero times infinity is not zero.
    pad = int(lookup.isfinite().to(torch.uint8).argmax())
    panels_of(codes, order, pad, weight[weight.numel() - bytes_of_codes :])
    finish(weight)
    return {"weight": weight, **kept}


def _width(codes: Codes) -> int:
    return {"u8": 8, "i8": 8, "hi4": 4, "lo4": 4}.get(codes.packing, codes.bits)


def restore(tensors: Mapping[str, Tensor], skeleton: Form) -> Form:
    """The exact inverse of :func:`prepare`; ``skeleton`` is the form on the meta device."""
    found = {
        name.removeprefix("form."): tensor
        for name, tensor in tensors.items()
        if name.startswith("form.")
    }
    if "weight" in tensors:
        assert isinstance(skeleton, Affine | Codebook | ScaledFloat)
        tensors = {**parts_of(tensors["weight"]), **tensors}
        codes, order = _codes(skeleton), tensors.get("order")
        data = panels_to(tensors["codes"], codes, order)
        if "last_byte" in found:
            data.view(torch.uint8).reshape(-1)[-1:] = found.pop("last_byte")
        if isinstance(skeleton, ScaledFloat):
            found["values"] = data.view(skeleton.values.dtype).reshape(skeleton.shape)
        else:
            found["codes"] = data.view(codes.data.dtype).reshape(codes.data.shape)
        found |= from_panels(tensors, skeleton.scale, skeleton.shape, "scale")
        if isinstance(skeleton, Affine) and skeleton.offset is not None:
            found |= from_panels(tensors, skeleton.offset, skeleton.shape, "offset")
        if "offset_value" in tensors:
            assert isinstance(skeleton, Affine) and isinstance(skeleton.offset, Tensor)
            found["offset"] = tensors["offset_value"].repeat(skeleton.offset.numel())
            found["offset"] = found["offset"].reshape(skeleton.offset.shape)
        if isinstance(skeleton, Affine) and skeleton.group_index is not None:
            assert order is not None
            index = torch.empty(order.numel(), dtype=torch.int64)
            index[order.to(torch.int64)] = torch.arange(order.numel()) // _columns(skeleton)
            found["group_index"] = index.to(skeleton.group_index.dtype)
    # A form names its tensors in the order in which it maps them.
    names = iter(skeleton.tensors())
    return skeleton.map_tensors(lambda _: found[next(names)])
