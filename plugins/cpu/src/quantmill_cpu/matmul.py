"""``y = x @ W.T + bias`` with W in the layout ``cpu-panels``, by the native library."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quantmill.kernels import Prepared
from quantmill_cpu.layout import SLOTS, prepare, restore
from quantmill_cpu.native import library

__all__ = ["matmul", "prepare", "restore"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NUMBERS = {name: number for number, name in enumerate(SLOTS)}
_Slots = ctypes.c_void_p * len(SLOTS)


@cache
def _library() -> ctypes.CDLL:
    """The library, with PyTorch's threads: those spin for a while after each of its operations,
    and threads of our own would get half of the processors meanwhile."""
    found = library()
    with contextlib.suppress(OSError, AttributeError):
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found.qm_borrow_threads(ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p))
    return found


def _call(
    x: Tensor, weight: list[Tensor], slots: list[int], rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    kind = _DTYPES.get(x.dtype)
    if kind is None or x.shape[-1] != columns or x.device.type != "cpu":
        raise ValueError(
            f"x must be float32, bfloat16 or float16 [..., {columns}] on the CPU,"
            f" not {x.dtype} {list(x.shape)} on {x.device}"
        )
    x = x.contiguous()
    address = None
    if bias is not None:
        if bias.dtype != x.dtype or bias.numel() != rows:
            raise ValueError(f"bias must be {x.dtype} [{rows}]")
        bias = bias.contiguous()
        address = bias.data_ptr()
    pointers = _Slots()
    for slot, tensor in zip(slots, weight, strict=True):
        pointers[slot] = tensor.data_ptr()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    failed = _library().qm_matmul(
        pointers,
        x.data_ptr(),
        address,
        y.data_ptr(),
        kind,
        x.numel() // columns,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the activations of a matmul")
    return y


@torch.library.custom_op("quantmill_cpu::matmul", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor, weight: list[Tensor], slots: list[int], rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """What a compiled graph contains; called directly it would cost more than the call itself."""
    return _call(x, weight, slots, rows, columns, bias)


@_operator.register_fake
def _fake(
    x: Tensor, weight: list[Tensor], slots: list[int], rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _read(tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors that the library reads, and their slots."""
    weight, slots = [], []
    for name, tensor in tensors.items():
        slot = _NUMBERS.get(name)
        if slot is not None:
            weight.append(tensor)
            slots.append(slot)
    return weight, slots


def matmul(x: Tensor, live: Prepared, bias: Tensor | None) -> Tensor:
    """The kernel, for any number of rows of ``x``.

    Raises:
        ValueError: ``x`` or ``bias`` don't fit the weight.
    """
    tensors = live.tensors
    if "spec" not in tensors:
        return live.restore().matmul(x, bias)
    rows, columns = live.skeleton.shape
    weight, slots = _read(tensors)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.quantmill_cpu.matmul(x, weight, slots, rows, columns, bias)
        return result
    return _call(x, weight, slots, rows, columns, bias)
