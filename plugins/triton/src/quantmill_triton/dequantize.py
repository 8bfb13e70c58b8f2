"""The dequantize kernel of the registry; signature in :mod:`quantmill.kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import quantmill_triton.ops  # noqa: F401 defines the operators
from quantmill_triton.calls import arguments
from quantmill_triton.layout import is_plain

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.kernels import Prepared

__all__ = ["dequantize"]


def dequantize(form: Prepared, dtype: torch.dtype | None = None) -> Tensor:
    """The weight ``[out, in]``, equal to the form's reference bit for bit.

    Args:
        form: a form in the layout ``triton``.
        dtype: bfloat16, float16 or float32; by default the form's.
    """
    if is_plain(form.tensors):
        return form.restore().dequantize(dtype)
    tensors, facts, factor = arguments(form.tensors, form.skeleton)
    dtype = dtype or form.skeleton.dtype
    result: Tensor = torch.ops.quantmill_triton.dequantize(*tensors, facts, factor, dtype)
    return result
