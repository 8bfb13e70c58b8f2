"""The float weight of the layout ``cpu-panels``, by the native library.

An operator of PyTorch with a fake implementation, so that compilers see one node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.kernels import Prepared
from quantmill_cpu.matmul import DTYPES, FAILURES
from quantmill_cpu.operators import OPERATORS, torch_library

__all__ = ["dequantize"]

OPERATORS.define("dequantize(Tensor weight, int rows, int columns, ScalarType dtype) -> Tensor")


def dequantize(form: Prepared, dtype: torch.dtype | None = None) -> Tensor:
    """The weight ``[out, in]``, as exact as float32 is: rounded once, to the dtype.

    Args:
        form: a form in the layout ``cpu-panels``.
        dtype: bfloat16, float16 or float32; by default the form's.

    Raises:
        ValueError: the weight doesn't lie at a multiple of 64 bytes.
    """
    dtype = dtype or form.skeleton.dtype
    if "weight" not in form.tensors or dtype not in DTYPES:
        return form.restore().dequantize(dtype)
    rows, columns = form.skeleton.shape
    result: Tensor = torch.ops.quantmill_cpu.dequantize(
        form.tensors["weight"], rows, columns, dtype
    )
    return result


def _dequantize(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((rows, columns), dtype=dtype)
    failed = torch_library().qm_dequantize(
        weight.data_ptr(), out.data_ptr(), DTYPES[dtype], torch.get_num_threads()
    )
    if failed:
        raise FAILURES[failed]
    return out


OPERATORS.impl("dequantize", _dequantize, "CPU")


@torch.library.register_fake("quantmill_cpu::dequantize", lib=OPERATORS)
def _fake(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((rows, columns), dtype=dtype)
