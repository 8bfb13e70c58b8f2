"""The matmul kernel of the registry; signature in :mod:`quantmill.kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import quantmill_triton.ops  # noqa: F401 defines the operators
from quantmill_triton.calls import arguments
from quantmill_triton.layout import is_plain

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.kernels import Prepared

__all__ = ["matmul"]


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
