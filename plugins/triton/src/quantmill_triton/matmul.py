"""The matmul kernels of the registry; signatures in :mod:`quantmill.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

import quantmill_triton.ops  # noqa: F401 defines the operators
from quantmill_triton.calls import arguments
from quantmill_triton.layout import is_plain

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.kernels import Prepared

__all__ = ["bind_grouped", "grouped_matmul", "matmul"]


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
    if is_plain(form.tensors):
        return form.restore().matmul(x, bias)
    tensors, facts, factor = arguments(form.tensors, form.skeleton)
    result: Tensor = torch.ops.quantmill_triton.matmul(x, *tensors, bias, facts, factor)
    return result


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
    return partial(_run, weights)


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


def _run(weights: Prepared, x: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    tensors, facts, factor = arguments(weights.tensors, weights.skeleton)
    result: Tensor = torch.ops.quantmill_triton.grouped_matmul(
        x, ends, *tensors, bias, facts, factor
    )
    return result
