"""``y = x @ W.T + bias`` with W as ggml's blocks, as they lie in a file: nothing is prepared.

Rows are decoded into the processor's cache a few at a time and multiplied there in float32, so that
a mapped file is all the memory that its weights take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from quantmill_cpu.ggml_types import TYPES
from quantmill_cpu.operators import torch_library

if TYPE_CHECKING:
    from quantmill.forms import Form

__all__ = ["bind", "matmul"]


def _call(
    x: Tensor, data: Tensor, points: Tensor | None, type_name: str, bias: Tensor | None
) -> Tensor:
    found = TYPES[type_name]
    rows = data.shape[0]
    columns = data.shape[1] // found.size * found.values
    if not x.is_cpu or not x.is_floating_point() or x.shape[-1] != columns:
        raise ValueError(
            f"x must be float [..., {columns}] on the CPU, not {x.dtype} {list(x.shape)}"
            f" on {x.device}"
        )
    if bias is not None and (bias.numel() != rows or not bias.is_cpu):
        raise ValueError(f"bias must be [{rows}] on the CPU")
    values = x.to(torch.float32).contiguous()
    more = None if bias is None else bias.to(torch.float32).contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    failed = torch_library().qm_ggml_matmul(
        found.number,
        data.data_ptr(),
        rows,
        columns,
        None if points is None else points.data_ptr(),
        values.data_ptr(),
        values.numel() // columns,
        None if more is None else more.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the product with a matrix of {type_name}")
    return y.to(x.dtype)


_OPERATORS: Final = torch.library.Library("quantmill_cpu", "FRAGMENT")
_OPERATORS.define(
    "ggml_matmul(Tensor x, Tensor data, Tensor? points, str type_name, Tensor? bias) -> Tensor"
)
_OPERATORS.impl("ggml_matmul", _call, "CPU")


@torch.library.register_fake("quantmill_cpu::ggml_matmul", lib=_OPERATORS)
def _fake(
    x: Tensor, data: Tensor, points: Tensor | None, type_name: str, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


class _Bound:
    """A matmul of one weight."""

    __slots__ = ("_data", "_form", "_points", "_type_name")

    def __init__(self, form: Any) -> None:
        name: str = form.type_name
        if name not in TYPES:
            raise ValueError(f"{name!r} is no type of blocks")
        self._form, self._type_name = form, name
        self._data: Tensor = form.data.contiguous()
        if self._data.dtype != torch.uint8 or self._data.shape[1] % TYPES[name].size:
            raise ValueError(f"{name} must be uint8 rows of whole blocks")
        self._points: Tensor | None = form.points if TYPES[name].points else None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.quantmill_cpu.ggml_matmul(
                x, self._data, self._points, self._type_name, bias
            )
            return result
        return _call(x, self._data, self._points, self._type_name, bias)

    def __reduce__(self) -> tuple[Any, ...]:
        return bind, (self._form,)


def bind(form: Form) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The kernel for one weight: ``fn(x, bias)``, for any number of rows of ``x``.

    Args:
        form: of kind ``ggml``: uint8 ``data`` ``[rows, row bytes]``, the name of its type, and for
            a lattice its ``points``, int8 ``[points, coordinates]``.

    ``fn`` raises ValueError where ``x`` or ``bias`` don't fit the weight.
    """
    return form.matmul if next(iter(form.tensors().values())).is_meta else _Bound(form)


def matmul(x: Tensor, form: Form, bias: Tensor | None) -> Tensor:
    """:func:`bind` and its call at once."""
    return bind(form)(x, bias)
