"""Scales and offsets of the live layout: 16 rows of a group side by side.

Tensors keep their dtype. Forms of 8 bits or fewer (double quantization, K-quants' scales,
NVFP4's) stay quantized: their codes lie like a tensor's, a byte each, and the kernel looks them
up in a table and multiplies by the second level. Anything else is expanded to float32 and kept
beside as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    FormValue,
    Group,
    Grouping,
    PerTensor,
    ScaledFloat,
    value_of,
)
from quantmill_cpu.weight import CODED, KINDS

__all__ = ["Stored", "from_panels", "store"]

_NONE, _FLAT, _ROW, _ONE = range(4)
_PANEL = 16


@dataclass(frozen=True, slots=True)
class Stored:
    """How the kernel finds a group's value; see ``QM_SPEC_SCALE_*`` in ``c/matmul.h``."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that the kernel reads, by their names in the weight."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What can't be had back from these, as it was."""
    kind: int = 0
    lanes: int = 0
    level: int = _NONE
    size: int = 1
    stride: int = 0
    plus: float = 0.0

    @property
    def spec(self) -> tuple[int, ...]:
        """The five numbers of a value in the kernel's ``spec``."""
        return self.kind, self.lanes, self.level, self.size, self.stride


def _panels(values: Tensor) -> Tensor:
    """``[rows, groups]`` as ``[panels, groups, 16]``, with zeros below the last row."""
    rows, groups = values.shape
    panels = -(-rows // _PANEL)
    padded = values.new_zeros((panels * _PANEL, groups))
    padded[:rows] = values
    return padded.reshape(panels, _PANEL, groups).transpose(1, 2).contiguous()


def _rows(panels: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`_panels`."""
    _, groups, _ = panels.shape
    rows_first = panels.transpose(1, 2).reshape(-1, groups)[:rows]
    return rows_first.clone(memory_format=torch.contiguous_format)


def _laid(values: Tensor, grouping: Grouping, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Values, one per group, as the kernel reads them, and the lanes that a value has."""
    if isinstance(grouping, PerTensor):
        return values.reshape(1), 0
    if isinstance(grouping, Blocks):
        values = values.reshape(grouping.scale_shape(shape))
        if grouping.rows % _PANEL == 0:
            count = -(-shape[0] // _PANEL)
            wide = values.repeat_interleave(grouping.rows // _PANEL, dim=0)
            # A view would keep the rows that are cut off in memory.
            return wide[:count].clone(), 1
        return _panels(values.repeat_interleave(grouping.rows, dim=0)[: shape[0]]), _PANEL
    return _panels(values.reshape(shape[0], -1)), _PANEL


def _kept(value: FormValue, name: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {f"form.{name}": value}
    return {f"form.{name}.{inner}": tensor for inner, tensor in value.tensors().items()}


def store(value: FormValue, grouping: Grouping, shape: tuple[int, ...], name: str) -> Stored:
    """Store the value of each group of a ``[rows, columns]`` form; ``name`` is its slot."""
    if isinstance(value, Form):
        coded = None if isinstance(grouping, Blocks) else _store_coded(value, grouping, shape, name)
        return coded or _expanded(value, grouping, shape, name)
    if value.dtype not in KINDS:
        table = _patterns(value.dtype)
        if table is None:
            return _expanded(value, grouping, shape, name)
        laid, lanes = _laid(_as_bytes(value), grouping, shape)
        parts = {name: laid, f"{name}_table": table.to(value.device)}
        kind = CODED
    else:
        laid, lanes = _laid(value, grouping, shape)
        parts, kind = {name: laid}, KINDS[value.dtype]
    # In blocks what is kept is small, and simpler than the way back.
    kept = _kept(value, name) if isinstance(grouping, Blocks) else {}
    return Stored(parts, kept, kind, lanes)


def _expanded(value: FormValue, grouping: Grouping, shape: tuple[int, ...], name: str) -> Stored:
    laid, lanes = _laid(value_of(value), grouping, shape)
    return Stored({name: laid}, _kept(value, name), KINDS[torch.float32], lanes)


def _as_bytes(values: Tensor) -> Tensor:
    if values.is_meta:
        return torch.empty(values.shape, dtype=torch.uint8, device="meta")
    return values.view(torch.uint8)


def _patterns(dtype: torch.dtype) -> Tensor | None:
    """float32 ``[256]``: the values of an 8-bit float dtype."""
    if not dtype.is_floating_point or dtype.itemsize != 1:
        return None
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).to(torch.float32)


# ---- Values that are forms of their own --------------------------------------------------------


def _inner(value: Form) -> tuple[Tensor, Tensor, FormValue] | None:
    """A form's codes (a byte each), what they stand for ``[256]``, and its scale."""
    if isinstance(value, ScaledFloat):
        table = _patterns(value.values.dtype)
        return None if table is None else (_as_bytes(value.values), table, value.scale)
    if not isinstance(value, Affine | Codebook) or value.codes.bits > 8:
        return None
    if isinstance(value, Codebook):
        entries = value.table.to(torch.float32)
        if value.table.numel() > 256:
            return None
    else:
        if value.offset is not None or value.group_index is not None:
            return None
        entries = torch.arange(256, dtype=torch.float32)
        if value.codes.packing == "i8":
            entries = torch.cat([entries[:128], entries[:128] - 128])
        entries = entries * value.factor
    table = torch.zeros(256, device=entries.device)
    table[: entries.numel()] = entries.reshape(-1)[:256]
    meta = value.codes.data.is_meta
    codes = torch.empty(value.shape, device="meta") if meta else value.codes.unpack()
    return _as_bytes(codes), table, value.scale


def _second(grouping: Grouping, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Level, size and stride with which the kernel finds the second level's value."""
    if isinstance(grouping, PerTensor):
        return _ONE, 1, 0
    if isinstance(grouping, Flat):
        return _FLAT, grouping.size, 0
    if len(shape) == 2 and isinstance(grouping, Group):
        return _ROW, grouping.size, -(-shape[1] // grouping.size)
    if len(shape) == 2 and grouping == Channel(0):
        return _ROW, shape[1], 1
    return None


def _store_coded(
    value: Form, grouping: Grouping, shape: tuple[int, ...], name: str
) -> Stored | None:
    inner = _inner(value)
    if inner is None:
        return None
    assert isinstance(value, Affine | Codebook | ScaledFloat)
    codes, table, scale = inner
    second = _second(value.grouping, value.shape)
    if second is None or isinstance(scale, Form):
        return None
    laid, lanes = _laid(codes, grouping, shape)
    parts = {name: laid, f"{name}_table": table.to(codes.device)}
    parts[f"{name}_level"] = scale.to(torch.float32).reshape(-1).contiguous()
    kept = _kept(value, name)
    plus = 0.0
    if isinstance(value, Codebook) and value.offset is not None and not value.offset.is_meta:
        plus = float(value.offset)
    # The codes come back from the panels, and the second level too where it is as it was.
    for known in ("codes", "values", *(("scale",) if scale.dtype == torch.float32 else ())):
        kept.pop(f"form.{name}.{known}", None)
    if isinstance(value, Affine | Codebook) and value.codes.packing not in ("u8", "i8"):
        kept[f"form.{name}.last_byte"] = value.codes.data.reshape(-1).view(torch.uint8)[-1:].clone()
    return Stored(parts, kept, CODED, lanes, *second, plus)


def from_panels(
    tensors: Mapping[str, Tensor], skeleton: FormValue, rows: int, name: str
) -> dict[str, Tensor]:
    """The tensors of a stored value that are not kept under ``form.``, by their paths."""
    if name not in tensors:
        return {}
    panels = tensors[name]
    plain = _rows(panels, rows) if panels.ndim == 3 else panels.clone()
    if isinstance(skeleton, Tensor):
        if f"form.{name}" in tensors:
            return {}
        return {name: plain.view(skeleton.dtype).reshape(skeleton.shape)}
    if f"{name}_table" not in tensors:
        return {}
    assert isinstance(skeleton, Affine | Codebook | ScaledFloat)
    found: dict[str, Tensor] = {}
    if f"form.{name}.scale" not in tensors:
        assert isinstance(skeleton.scale, Tensor)
        found[f"{name}.scale"] = tensors[f"{name}_level"].clone().reshape(skeleton.scale.shape)
    if isinstance(skeleton, ScaledFloat):
        found[f"{name}.values"] = plain.view(skeleton.values.dtype).reshape(skeleton.shape)
        return found
    like = skeleton.codes
    if like.packing in ("u8", "i8"):
        data = plain.view(like.data.dtype)
    else:
        data = Codes.pack(plain, like.bits, like.packing).data
        data.reshape(-1)[-1:] = tensors[f"form.{name}.last_byte"]
        data = data.view(like.data.dtype)
    found[f"{name}.codes"] = data.reshape(like.data.shape)
    return found
