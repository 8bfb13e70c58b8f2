"""What can be wrong with a form although it can be decoded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantmill.findings import Finding, Severity, declare
from quantmill.forms import Affine, Codebook, Codes, Form, ScaledFloat, float_rows

__all__ = ["check_form"]

BAD_SCALE = declare("QM-VERIFY-001", "A scale, offset or table holds NaN or infinity")
BAD_CODE = declare("QM-VERIFY-002", "A code or zero point lies outside of its bits")
BAD_ORDER = declare("QM-VERIFY-003", "A group index is not one")
BAD_VALUE = declare("QM-VERIFY-004", "A dequantized weight holds NaN or infinity")
LOST = declare("QM-VERIFY-005", "A weight, or a part of it, has lost its values", Severity.WARNING)
_ROWS = 1 << 21
_AGAIN = "get it again, or quantize the float model anew"


def check_form(form: Form, name: str) -> Iterator[Finding]:
    """Findings about one weight ``[out, in]``; ``name`` is its module's."""
    found = list(_parts(form, name))
    yield from found
    if not found:
        yield from _values(form, name)


def _parts(form: Form, name: str, path: str = "") -> Iterator[Finding]:
    """Its tensors, nested scales and offsets included."""
    if isinstance(form, Affine):
        yield from _codes(form.codes, name, path)
        yield from _zeros(form, name, path)
        yield from _order(form, name)
    elif isinstance(form, Codebook):
        yield from _codes(form.codes, name, path)
        yield from _finite(form.table, name, f"{path}table")
    if isinstance(form, Affine | Codebook | ScaledFloat):
        for part in ("scale", "offset"):
            value = getattr(form, part, None)
            if isinstance(value, Form):
                yield from _parts(value, name, f"{path}{part}.")
            elif isinstance(value, Tensor) and value.is_floating_point():
                yield from _finite(value, name, path + part)


def _finite(values: Tensor, name: str, part: str) -> Iterator[Finding]:
    finite = torch.isfinite(values.to(torch.float32))
    if not bool(finite.all()):
        count = int((~finite).sum())
        yield BAD_SCALE(name, f"{count} of {finite.numel()} numbers of its {part} are not", _AGAIN)


def _codes(codes: Codes, name: str, path: str) -> Iterator[Finding]:
    if codes.packing != "u8" or codes.bits >= 8:
        return  # Packed codes can't be out of range.
    top = int(codes.data.max()) if codes.data.numel() else 0
    if top >= 2**codes.bits:
        yield BAD_CODE(
            name, f"a code of its {path or 'weight'} is {top}: {codes.bits} bits", _AGAIN
        )


def _zeros(form: Affine, name: str, path: str) -> Iterator[Finding]:
    offset = form.offset
    if form.offset_kind != "zero" or not isinstance(offset, Tensor) or not offset.numel():
        return
    low, high = float(offset.float().min()), float(offset.float().max())
    signed = form.codes.packing == "i8"
    least, most = (-128, 127) if signed else (0, 2**form.codes.bits - 1)
    # Float zero points (HQQ) are fitted and may lie outside.
    if not offset.is_floating_point() and (low < least or high > most):
        yield BAD_CODE(
            name,
            f"{path}zero points reach from {low:g} to {high:g}: {form.codes.bits} bits",
            _AGAIN,
        )


def _order(form: Affine, name: str) -> Iterator[Finding]:
    index = form.group_index
    if index is None:
        return
    groups = form.grouping.scale_shape(form.shape)[-1]
    low, high = int(index.min()), int(index.max())
    if index.shape != (form.shape[-1],) or low < 0 or high >= groups:
        yield BAD_ORDER(
            name,
            f"it has {list(index.shape)} entries from {low} to {high}, for {form.shape[-1]} columns"
            f" and {groups} groups",
            _AGAIN,
        )
        return
    counts = torch.bincount(index.to(torch.int64), minlength=groups)
    size = getattr(form.grouping, "size", 0)
    if size and bool((counts[:-1] != size).any()):
        worst = int((counts[:-1] - size).abs().argmax())
        yield BAD_ORDER(
            name, f"group {worst} has {int(counts[worst])} columns instead of {size}", _AGAIN
        )


def _values(form: Form, name: str) -> Iterator[Finding]:
    """Its dequantized values."""
    rows = max(1, _ROWS // max(1, form.shape[-1]))
    zero_rows = total = bad = 0
    anything = False
    for _, block in float_rows(form, rows):
        finite = torch.isfinite(block)
        bad += int((~finite).sum())
        flat = block.reshape(block.shape[0], -1)
        zero_rows += int((flat == 0).all(dim=1).sum())
        total += flat.shape[0]
        anything = anything or bool((block != 0).any())
    if bad:
        yield BAD_VALUE(name, f"{bad} of its values are", _AGAIN)
    if not anything:
        yield LOST(name, "all its values are zero", "compare it with the float model")
    elif zero_rows * 2 > total:
        yield LOST(name, f"{zero_rows} of {total} rows are zero", "compare it with the float model")
