"""Scales and offsets of the live layout: 16 rows of a group side by side.

Tensors keep their dtype. Forms of 8 bits or fewer (double quantization, K-quants' scales,
NVFP4's) stay quantized: their codes lie in planes like a tensor's, groups in place of columns, and
the kernel looks them up or counts with them, and multiplies by the second level. Anything else is
expanded to float32 and kept beside as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from quantmill_cpu.codes import panels_of_groups, panels_of_values, panels_to_groups
from quantmill_cpu.weight import CODED, KINDS, LEVEL_KINDS, ROW

__all__ = ["Stored", "from_panels", "store"]

_NONE, _FLAT, _ONE = 0, 1, 3
_PANEL = 16


@dataclass(frozen=True, slots=True)
class Stored:
    """How the kernel finds a group's value; see ``QM_VALUES_*`` in ``c/matmul.h``."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that the kernel reads, by their names in the weight."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What can't be had back from these, as it was."""
    kind: int = 0
    lanes: int = 0
    bits: int = 8
    level: int = _NONE
    level_kind: int = 0
    size: int = 1
    stride: int = 0
    constants: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Step, low and what is added in the end."""

    @property
    def spec(self) -> tuple[int, ...]:
        """``QM_VALUES_*``, in their order."""
        place = self.level, self.level_kind, self.size, self.stride
        return self.kind, self.lanes, self.bits, *place


def _panels(values: Tensor) -> Tensor:
    """``[rows, groups]`` as ``[panels, groups, 16]``, with zeros below the last row."""
    rows, groups = values.shape
    panels = -(-rows // _PANEL)
    if values.device.type == "cpu" and values.itemsize <= 4:
        # Not by PyTorch, whose threads go on spinning where others have work by then.
        return panels_of_values(values.contiguous())
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
        coded = _store_coded(value, shape, name) if _own_lanes(grouping) else None
        return coded or _expanded(value, grouping, shape, name)
    # In blocks what is kept is small, and simpler than the way back.
    kept = _kept(value, name) if isinstance(grouping, Blocks) else {}
    if value.dtype in KINDS:
        laid, lanes = _laid(value, grouping, shape)
        return Stored({name: laid}, kept, KINDS[value.dtype], lanes)
    table = _patterns(value.dtype)
    if table is None:
        return _expanded(value, grouping, shape, name)
    data, entries = _as_bytes(value), {f"{name}_table": _with_planes(table).to(value.device)}
    if _own_lanes(grouping):
        codes = Codes(data, 8, tuple(data.shape), "u8")
        return Stored({name: panels_of_groups(_matrix(codes, shape)), **entries}, {}, CODED, _PANEL)
    laid, lanes = _laid(data, grouping, shape)
    if lanes == _PANEL:
        rows = _rows(laid, shape[0])
        laid = panels_of_groups(Codes(rows, 8, tuple(rows.shape), "u8"))
    return Stored({name: laid, **entries}, kept, CODED, lanes)


def _own_lanes(grouping: Grouping) -> bool:
    return not isinstance(grouping, Blocks | PerTensor)


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


def _with_planes(table: Tensor) -> Tensor:
    """float32 ``[256 + 192]``: the table, then all second bytes of its entries, third, fourth."""
    planes = table.contiguous().view(torch.uint8).reshape(256, 4)[:, 1:].t().contiguous()
    return torch.cat([table, planes.reshape(-1).view(torch.float32)])


def _matrix(codes: Codes, shape: tuple[int, ...]) -> Codes:
    """Codes, one for each group of a ``[rows, columns]`` form, as ``[rows, groups]``."""
    return replace(codes, shape=(shape[0], codes.count // shape[0]))


# ---- Values that are forms of their own --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Inner:
    """A form's codes and what they stand for: entries of ``table``, or ``step * code + low``."""

    codes: Codes
    scale: FormValue
    table: Tensor | None
    step: float = 1.0
    low: float = 0.0


def _inner(value: Form) -> _Inner | None:
    if isinstance(value, ScaledFloat):
        table = _patterns(value.values.dtype)
        codes = Codes(_as_bytes(value.values), 8, value.shape, "u8")
        return None if table is None else _Inner(codes, value.scale, table)
    if not isinstance(value, Affine | Codebook) or value.codes.bits > 8:
        return None
    codes = value.codes
    if codes.bits == 7:  # a width without planes
        codes = replace(codes if codes.packing == "i8" else codes.repacked("u8"), bits=8)
    if isinstance(value, Codebook):
        entries = value.table.to(torch.float32).reshape(-1)
        if entries.numel() > 256:
            return None
        table = torch.zeros(256, device=entries.device)
        table[: entries.numel()] = entries
        return _Inner(codes, value.scale, table)
    if value.offset is not None or value.group_index is not None:
        return None
    # In panels signed codes are moved by half their range.
    low = -(2.0 ** (codes.bits - 1)) if codes.packing == "i8" else 0.0
    return _Inner(codes, value.scale, None, value.factor, low * value.factor)


def _second(
    scale: Tensor, grouping: Grouping, shape: tuple[int, int]
) -> tuple[Tensor, int, int, int] | None:
    """The second level as the kernel reads it, and how it finds a value: level, size, stride."""
    rows, groups = shape
    if isinstance(grouping, PerTensor):
        return scale.reshape(-1), _ONE, 1, 0
    if isinstance(grouping, Flat) and groups % grouping.size:
        return scale.reshape(-1).contiguous(), _FLAT, grouping.size, 0
    if isinstance(grouping, Flat | Group):
        size = grouping.size
    elif grouping == Channel(0):
        size = groups
    else:
        return None
    stride = -(-groups // size)
    return _panels(scale.reshape(rows, stride)), ROW, size, stride


def _store_coded(value: Form, shape: tuple[int, ...], name: str) -> Stored | None:
    inner = _inner(value)
    if inner is None or isinstance(inner.scale, Form):
        return None
    assert isinstance(value, Affine | Codebook | ScaledFloat)
    scale = inner.scale if inner.scale.dtype in LEVEL_KINDS else inner.scale.to(torch.float32)
    codes = _matrix(inner.codes, shape)
    flat = isinstance(value.grouping, Flat | PerTensor)
    if not flat and value.shape != codes.shape:
        return None
    second = _second(scale, value.grouping, (codes.shape[0], codes.shape[1]))
    if second is None:
        return None
    level, how, size, stride = second
    parts = {name: panels_of_groups(codes), f"{name}_level": level}
    if inner.table is not None:
        parts[f"{name}_table"] = _with_planes(inner.table).to(level.device)
    kept = _kept(value, name)
    plus = 0.0
    if isinstance(value, Codebook) and value.offset is not None and not value.offset.is_meta:
        plus = float(value.offset)
    # The codes come back from the panels, and the second level too where it is as it was.
    for known in ("codes", "values", *(("scale",) if scale.dtype == inner.scale.dtype else ())):
        kept.pop(f"form.{name}.{known}", None)
    if isinstance(value, Affine | Codebook) and value.codes.packing not in ("u8", "i8"):
        kept[f"form.{name}.last_byte"] = value.codes.data.reshape(-1).view(torch.uint8)[-1:].clone()
    return Stored(
        parts,
        kept,
        CODED,
        _PANEL,
        codes.bits,
        how,
        LEVEL_KINDS[scale.dtype],
        size,
        stride,
        (inner.step, inner.low, plus),
    )


def from_panels(
    tensors: Mapping[str, Tensor], skeleton: FormValue, shape: tuple[int, ...], name: str
) -> dict[str, Tensor]:
    """The tensors of a stored value that are not kept under ``form.``, by their paths; ``shape``
    is the form's."""
    if name not in tensors or f"form.{name}" in tensors:
        return {}
    rows, panels = shape[0], tensors[name]
    if isinstance(skeleton, Tensor):
        if f"{name}_table" in tensors and panels.ndim == 1:
            bytewise = Codes(_as_bytes(skeleton), 8, tuple(skeleton.shape), "u8")
            plain = panels_to_groups(panels, _matrix(bytewise, shape))
        else:
            plain = _rows(panels, rows) if panels.ndim == 3 else panels.clone()
        return {name: plain.view(skeleton.dtype).reshape(skeleton.shape)}
    if f"{name}_level" not in tensors:
        return {}
    assert isinstance(skeleton, Affine | Codebook | ScaledFloat)
    found: dict[str, Tensor] = {}
    if f"form.{name}.scale" not in tensors:
        assert isinstance(skeleton.scale, Tensor)
        level = tensors[f"{name}_level"]
        plain = _rows(level, rows) if level.ndim == 3 else level.clone()
        found[f"{name}.scale"] = plain.reshape(skeleton.scale.shape)
    inner = _inner(skeleton)
    assert inner is not None
    data = panels_to_groups(panels, _matrix(inner.codes, shape))
    if isinstance(skeleton, ScaledFloat):
        found[f"{name}.values"] = data.view(skeleton.values.dtype).reshape(skeleton.shape)
        return found
    like = skeleton.codes
    if inner.codes.packing != like.packing:
        data = Codes.pack(data, like.bits, like.packing).data.reshape(-1).view(torch.uint8)
    if f"form.{name}.last_byte" in tensors:
        data[-1:] = tensors[f"form.{name}.last_byte"]
    found[f"{name}.codes"] = data.view(like.data.dtype).reshape(like.data.shape)
    return found
