"""The matmul kernels of the registry; signatures in :mod:`quantmill.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from quantmill_triton.calls import arguments
from quantmill_triton.facts import Facts
from quantmill_triton.launch import Weight
from quantmill_triton.layout import is_plain
from quantmill_triton.ops import product

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.kernels import Prepared

__all__ = ["bind", "bind_grouped", "grouped_matmul", "matmul"]


def matmul(x: Tensor, form: Prepared, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``.

    Args:
        x: bfloat16, float16 or float32 ``[..., in]``.
        form: a form ``[out, in]`` in the layout ``triton``.
        bias: ``[out]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., out]`` in the dtype of ``x``. Sums are float32. Weights are rounded to that dtype
        once, or not at all: see :mod:`quantmill_triton.kernels`.
    """
    return bind(form)(x, bias)


class _Bound:
    """A matmul of one weight: everything that is the same for all calls is at hand."""

    __slots__ = ("_device", "_factor", "_facts", "_live", "_numbers", "_weight")

    def __init__(self, live: Prepared) -> None:
        self._live = live
        tensors, self._numbers, self._factor = arguments(live.tensors, live.skeleton)
        self._weight = Weight(*tensors)._replace(descriptors={})  # type: ignore[arg-type]
        self._facts = Facts(*self._numbers)
        self._device = self._weight.codes.device.type

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or not self._simple(x):
            result: Tensor = torch.ops.quantmill_triton.matmul.default(
                x, *self._weight.tensors, bias, self._numbers, self._factor
            )
            return result
        return product(x, self._weight, bias, self._facts, self._factor)

    def _simple(self, x: Tensor) -> bool:
        """Whether nobody would see the operator: PyTorch takes as long to call it as the kernel
        does to start."""
        return (
            type(x) is torch.Tensor
            and x.device.type == self._device
            and not x.requires_grad
            and not is_in_torch_dispatch_mode()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return bind, (self._live,)


def bind(live: Prepared) -> Callable[[Tensor, Tensor | None], Tensor]:
    """:func:`matmul` for one weight: ``fn(x, bias)``."""
    return live.restore().matmul if is_plain(live.tensors) else _Bound(live)


class _Grouped(_Bound):
    """A matmul of many weights, their tensors stacked."""

    __slots__ = ()

    def __call__(self, x: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        result: Tensor = torch.ops.quantmill_triton.grouped_matmul.default(
            x, ends, *self._weight.tensors, bias, self._numbers, self._factor
        )
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return bind_grouped, (self._live,)


def bind_grouped(
    weights: Prepared,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """:func:`grouped_matmul` for these weights, or None where they have no layout, or not the same
    tables."""
    if is_plain(weights.tensors):
        return None
    tables = [weights.tensors[name] for name in ("table", "lut", "unit") if name in weights.tensors]
    if not all(torch.equal(item, item[:1].expand_as(item)) for item in tables):
        return None
    return _Grouped(weights)


def grouped_matmul(x: Tensor, ends: Tensor, weights: Prepared, bias: Tensor | None) -> Tensor:
    """Rows of ``x`` by the matrix that they are sorted for.

    Args:
        x: bfloat16 or float16 ``[rows, in]``.
        ends: int64 ``[matrices]``: the row after each one's last, on the device of ``x``.
        weights: forms ``[out, in]`` in the layout ``triton``, their tensors stacked.
        bias: ``[matrices, out]`` in the dtype of ``x``, or None.

    Returns:
        ``[rows, out]``, with zeros in rows after the last end. Rounded as by :func:`matmul`.

    Raises:
        ValueError: the weights don't have the layout, or not the same tables.
    """
    bound = bind_grouped(weights)
    if bound is None:
        raise ValueError("these weights have no layout in common")
    return bound(x, ends, bias)
