"""Blocks from values and values from blocks: the types' definitions, or a kernel where one fits.

Kernels of the registry for the form ``ggml``, with the type's name as the trait ``table``:

``quantize``
    ``fn(block, *, type_name, importance, out)``: ``block`` float ``[rows, columns]``, contiguous;
    ``importance`` float32 ``[columns]`` or None; ``out`` uint8 ``[rows, row bytes]``. It returns
    the largest magnitude in ``block``; where that is NaN or infinity, ``out`` does not matter.
``dequantize``
    ``fn(form, dtype, out=None)``: ``form`` a :class:`~quantmill_gguf.types.RawForm`; ``out``
    float32 of its shape, contiguous, to write to in place of a new tensor.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.config import suggestion
from quantmill.findings import QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.types import TYPES, BlockType, RawForm

if TYPE_CHECKING:
    from quantmill.kernels import Choice, KernelRegistry

__all__ = ["MADE", "NotFinite", "decode", "encode", "kernel_for"]

_SURE = 2.0**14
"""A quarter of the largest float16."""


class NotFinite(QuantmillError):
    """A value is NaN or infinite."""


MADE = tuple(name for name, kind in TYPES.items() if kind.makes)
"""Names of the types that can be made."""


@cache
def _default_kernels() -> KernelRegistry:
    from quantmill.host import default_host
    from quantmill.kernels import KernelRegistry

    return KernelRegistry.of(default_host())


def kernel_for(
    type_name: str, kernels: KernelRegistry, device: str, dtype: torch.dtype
) -> Choice | None:
    """The kernel that makes blocks of a type of weights of ``dtype``, if there is one."""
    kind = str(dtype).removeprefix("torch.")
    traits = {"table": type_name}
    return kernels.choose("quantize", RawForm.kind, traits, device=device, dtype=kind)


def encode(
    type_name: str,
    values: Tensor,
    importance: Tensor | None = None,
    *,
    name: str = "weight",
    kernels: KernelRegistry | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize rows to blocks: uint8 ``[..., row bytes]``, the bytes of llama.cpp's quantizers.

    Args:
        type_name: one of :data:`MADE`.
        values: ``[..., columns]`` of any float dtype, finite.
        importance: float ``[columns]``, not negative: what the square of an error in each column
            costs (an importance matrix has it for each weight). Types that have no choice to make
            do not look at it.
        name: of the weight, for messages.
        kernels: to choose from; those of the installed plugins without it.
        out: uint8 of the result's shape, contiguous: written and returned.

    Raises:
        NotFinite: ``QM-GGUF-032``, a value is NaN or infinite.
        QuantmillError: ``QM-GGUF-009``, the type can't be made; ``030``, the columns don't fill
            its blocks; ``032``, a scale is not finite; ``033``, the importance does not fit.
    """
    kind = _made(type_name)
    columns = values.shape[-1]
    if columns % kind.info.block:
        cause = f"its width {columns} is no multiple of {kind.info.block}, a block of {type_name}"
        fix = "take a type of smaller blocks, or keep it float"
        raise QuantmillError(codes.NO_BLOCKS(name, cause, fix))
    if importance is not None:
        importance = _checked(importance, columns, name).to(values.device)
    rows = values.reshape(-1, columns)
    choice = kernel_for(type_name, kernels or _default_kernels(), values.device.type, values.dtype)
    shape = (*values.shape[:-1], kind.info.row_bytes(columns))
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    made = out.view(rows.shape[0], shape[-1])
    if choice is None:
        largest = _largest(rows)
    else:
        fill = choice.load()
        largest = fill(rows.contiguous(), type_name=type_name, importance=importance, out=made)
    if not math.isfinite(largest):
        fix = "look for the mistake in the model"
        raise NotFinite(codes.NOT_FINITE(name, "a value is NaN or infinite", fix))
    if choice is None:
        blocks = kind.quantize(rows, importance)
        assert blocks is not None
        made.copy_(blocks)
    # Without importance no scale is larger than the largest value: most need no look.
    bounded = importance is None and largest < _SURE
    if not bounded and not _scales_are_finite(made, kind):
        cause = f"a scale of {type_name} is beyond the largest float16"
        fix = "keep it float, or scale the weight down"
        raise QuantmillError(codes.NOT_FINITE(name, cause, fix))
    return out


def decode(
    type_name: str,
    raw: Tensor,
    out: Tensor | None = None,
    *,
    kernels: KernelRegistry | None = None,
) -> Tensor:
    """float32 ``[..., columns]`` of blocks uint8 ``[..., row bytes]``, bit-equal to llama.cpp's.

    Args:
        type_name: a key of :data:`quantmill_gguf.types.TYPES`.
        raw: little-endian bytes.
        out: float32 of the result's shape, contiguous: written and returned.
        kernels: to choose from; those of the installed plugins without it.
    """
    kind = TYPES[type_name]
    columns = raw.shape[-1] // kind.info.size * kind.info.block
    choice = (kernels or _default_kernels()).choose(
        "dequantize",
        RawForm.kind,
        {"table": type_name},
        device=raw.device.type,
        dtype="float32",
    )
    if choice is None:
        values = kind.decode(raw)
        return values if out is None else out.copy_(values)
    if out is None:
        out = torch.empty(*raw.shape[:-1], columns, dtype=torch.float32, device=raw.device)
    choice.load()(RawForm(raw.contiguous(), type_name), torch.float32, out=out)
    return out


def _made(type_name: str) -> BlockType:
    kind = TYPES.get(type_name)
    if kind is not None and kind.makes:
        return kind
    hint = suggestion(type_name.upper(), MADE) or f"take one of {', '.join(MADE)}"
    raise QuantmillError(codes.TYPE(type_name, f"{type_name!r} is no type that can be made", hint))


def _largest(rows: Tensor) -> float:
    return float(torch.stack(rows.aminmax()).abs().max()) if rows.numel() else 0.0


def _checked(importance: Tensor, columns: int, name: str) -> Tensor:
    wide = importance.detach().to(torch.float32).reshape(-1)
    cause = None
    if wide.numel() != columns:
        cause = f"it has {wide.numel()} columns, the weight {columns}"
    elif not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        cause = "it has a value that is negative, NaN or infinite"
    if cause is not None:
        fix = "compute the importance matrix again, from this model"
        raise QuantmillError(codes.IMPORTANCE(name, f"its importance does not fit: {cause}", fix))
    return wide.contiguous()


def _scales_are_finite(raw: Tensor, kind: BlockType) -> bool:
    if kind.info.plain:
        return True  # A number of its own: too large for float16 is infinite, as everywhere.
    at = kind.scales_at
    starts = [start for start, _ in kind.info.words] if at is None else at
    blocks = raw.reshape(-1, kind.info.size)
    return all(not bool(((blocks[:, i + 1] & 0x7C) == 0x7C).any()) for i in starts)
