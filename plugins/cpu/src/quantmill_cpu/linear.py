"""``y = x @ weight.T + bias`` with a bfloat16 weight that stays as it is, for a few rows of ``x``.

PyTorch's own product of few rows reads such a weight at about half of the memory's speed.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantmill_cpu.buffers import address
from quantmill_cpu.calibrate import no_dots
from quantmill_cpu.operators import NATIVE, OPERATORS, torch_library

__all__ = ["ROWS", "linear"]

ROWS: Final = 4
"""Most rows of ``x``: ``QM_LINEAR_ROWS``."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operators where they can't be native."""
    rows, columns = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    failed = torch_library().qm_linear(
        address(weight, torch.bfloat16, rows * columns, "weight"),
        address(x, torch.bfloat16, x.numel(), "x"),
        None if bias is None else address(bias, torch.bfloat16, rows, "bias"),
        address(y, torch.bfloat16, y.numel(), "y"),
        rows,
        columns,
        x.numel() // columns,
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(no_dots() or f"x has more than {ROWS} rows")
    return y


if not NATIVE:
    for _name in ("linear", "linear_bias"):
        OPERATORS.impl(_name, _linear, "CPU")


@torch.library.register_fake("quantmill_cpu::linear", lib=OPERATORS)
@torch.library.register_fake("quantmill_cpu::linear_bias", lib=OPERATORS)
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LINEAR: Final = torch.ops.quantmill_cpu.linear.default
_LINEAR_BIAS: Final = torch.ops.quantmill_cpu.linear_bias.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in]`` times ``weight [out, in]``; see :mod:`quantmill.kernels`.

    Raises:
        ValueError: a tensor is of the wrong dtype, device, shape or layout, or there are too many
            rows, or none.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not (tensor.dtype == torch.bfloat16 and tensor.is_cpu):
            raise ValueError(f"{name} must be bfloat16 on the CPU")
    if weight.ndim != 2 or not weight.is_contiguous() or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be contiguous [out, {x.shape[-1]}]")
    if not 0 < x.numel() <= ROWS * x.shape[-1]:
        raise ValueError(f"x must have 1 to {ROWS} rows")
    result: Tensor
    if bias is None:
        result = _LINEAR(x, weight)
    else:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}]")
        result = _LINEAR_BIAS(x, weight, bias.contiguous())
    return result
