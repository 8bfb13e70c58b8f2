"""``y = x @ W.T + bias`` with W in the layout ``cpu-panels``, by the native library.

Calls, of compiled graphs too, go to the operators ``quantmill_cpu::product`` and ``product_bias``,
which run without the interpreter (``c/operator.c``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.kernels import Prepared
from quantmill_cpu.layout import prepare, restore
from quantmill_cpu.operators import NATIVE, OPERATORS, torch_library

__all__ = [
    "DTYPES",
    "FAILURES",
    "bind",
    "bind_grouped",
    "grouped_matmul",
    "matmul",
    "prepare",
    "restore",
]

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FAILURES: Final = {
    -1: MemoryError("no memory for the activations of a matmul"),
    -2: ValueError("a weight must lie at a multiple of 64 bytes"),
}


def _product(
    x: Tensor, weight: Tensor, rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """The operators where they can't be native."""
    kind = _kind_of(x, columns)
    shape = x.shape
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], rows))
    failed = torch_library().qm_matmul(
        weight.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        kind,
        x.numel() // columns,
        torch.get_num_threads(),
    )
    if failed:
        raise FAILURES[failed]
    return y


def _kind_of(x: Tensor, columns: int) -> int:
    kind = DTYPES.get(x.dtype)
    if kind is None or x.shape[-1] != columns or not x.is_cpu:
        raise ValueError(
            f"x must be float32, bfloat16 or float16 [..., {columns}] on the CPU,"
            f" not {x.dtype} {list(x.shape)} on {x.device}"
        )
    return kind


def _checked_bias(bias: Tensor, x: Tensor, count: int) -> Tensor:
    if bias.dtype != x.dtype or bias.numel() != count:
        raise ValueError(f"bias must be {x.dtype} [{count}]")
    return bias.contiguous()


def _call_grouped(
    x: Tensor, weights: Tensor, ends: Tensor, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    kind = _kind_of(x, columns)
    count, each = weights.shape
    if x.ndim != 2 or ends.dtype != torch.int64 or ends.numel() != count:
        raise ValueError(f"x must have two dimensions, and ends be int64 [{count}]")
    x, ends = x.contiguous(), ends.contiguous()
    if bias is not None:
        bias = _checked_bias(bias, x, count * rows)
    y = x.new_empty((x.shape[0], rows))
    failed = torch_library().qm_matmul_grouped(
        weights.data_ptr(),
        each,
        count,
        ends.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        kind,
        x.shape[0],
        torch.get_num_threads(),
    )
    if failed:
        raise FAILURES[failed]
    return y


if not NATIVE:
    for _name in ("product", "product_bias"):
        OPERATORS.impl(_name, _product, "CPU")
OPERATORS.define(
    "grouped_matmul(Tensor x, Tensor weights, Tensor ends, int rows, int columns, Tensor? bias)"
    " -> Tensor"
)
OPERATORS.impl("grouped_matmul", _call_grouped, "CPU")


@torch.library.register_fake("quantmill_cpu::product", lib=OPERATORS)
@torch.library.register_fake("quantmill_cpu::product_bias", lib=OPERATORS)
def _fake(x: Tensor, weight: Tensor, rows: int, columns: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("quantmill_cpu::grouped_matmul", lib=OPERATORS)
def _fake_grouped(
    x: Tensor, weights: Tensor, ends: Tensor, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], rows))


_PRODUCT: Final = torch.ops.quantmill_cpu.product.default
_PRODUCT_BIAS: Final = torch.ops.quantmill_cpu.product_bias.default


class _Bound:
    """A matmul of one weight: everything that is the same for all calls is at hand."""

    __slots__ = ("_columns", "_live", "_rows", "_weight")

    def __init__(self, live: Prepared) -> None:
        self._live = live
        self._rows, self._columns = live.skeleton.shape
        self._weight = live.tensors["weight"]
        if not torch.compiler.is_compiling() and self._weight.data_ptr() % 64:
            raise FAILURES[-2]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self._rows, self._columns
        _kind_of(x, columns)
        result: Tensor
        if bias is None:
            result = _PRODUCT(x, self._weight, rows, columns)
        else:
            bias = _checked_bias(bias, x, rows)
            result = _PRODUCT_BIAS(x, self._weight, rows, columns, bias)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return bind, (self._live,)


def bind(live: Prepared) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The kernel for one weight: ``fn(x, bias)``, for any number of rows of ``x``.

    ``fn`` raises ValueError where ``x`` or ``bias`` don't fit the weight.

    Raises:
        ValueError: the weight doesn't lie at a multiple of 64 bytes.
    """
    if "weight" not in live.tensors:
        return live.restore().matmul
    return _Bound(live)


def matmul(x: Tensor, live: Prepared, bias: Tensor | None) -> Tensor:
    """:func:`bind` and its call at once."""
    return bind(live)(x, bias)


class _Grouped:
    """A matmul of many weights that lie one after the other."""

    __slots__ = ("_columns", "_live", "_rows", "_weights")

    def __init__(self, live: Prepared) -> None:
        self._live = live
        self._rows, self._columns = live.skeleton.shape
        self._weights = live.tensors["weight"]

    def __call__(self, x: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.quantmill_cpu.grouped_matmul(
                x, self._weights, ends, self._rows, self._columns, bias
            )
            return result
        return _call_grouped(x, self._weights, ends, self._rows, self._columns, bias)

    def __reduce__(self) -> tuple[Any, ...]:
        return bind_grouped, (self._live,)


def bind_grouped(live: Prepared) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The kernel for many weights of one shape, ``live`` being theirs stacked: ``fn(x, ends,
    bias)``, with the rows of ``x`` sorted by weight. None where they have no panels."""
    return _Grouped(live) if "weight" in live.tensors else None


def grouped_matmul(x: Tensor, ends: Tensor, live: Prepared, bias: Tensor | None) -> Tensor:
    """:func:`bind_grouped` and its call at once.

    Raises:
        ValueError: the weights have no panels, or an argument doesn't fit them.
    """
    bound = bind_grouped(live)
    if bound is None:
        raise ValueError("these weights have no panels")
    return bound(x, ends, bias)
