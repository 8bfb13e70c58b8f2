"""Attention, as a kernel of the registry; its signature is in :mod:`quantmill.kernels`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quantmill_cpu.calibrate import no_dots
from quantmill_cpu.native import library

__all__ = ["attention"]

_Shape = ctypes.c_int64 * 19
"""``QmAttention`` of ``attention.h``: seven sizes, and three strides of each of four tensors."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Tensor:
    """``softmax(scale * q @ k.T) @ v`` per head; with ``causal`` row i sees keys 0 to i.

    Args:
        q: ``[batch, heads, queries, dim]``, ``dim`` even.
        k: ``[batch, kv heads, keys, dim]``; runs of ``heads / kv heads`` heads share one.
        v: ``[batch, kv heads, keys, value dim]``.

    Returns:
        ``[batch, heads, queries, value dim]``, a transposed ``[batch, queries, heads, value dim]``.

    Raises:
        ValueError: tensors are of the wrong dtype, device, shape or layout.
        MemoryError: there is none for a copy of the keys and values.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be bfloat16 [batch, heads, tokens, dim] on the CPU")
        if tensor.stride(3) != 1 and tensor.shape[3] != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous")
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    if dim % 2 or k.shape != (batch, kv_heads, keys, dim):
        raise ValueError(f"k must be [{batch}, kv heads, keys, {dim}] with even {dim}")
    if v.shape[:3] != k.shape[:3] or not kv_heads or heads % kv_heads:
        raise ValueError("v must have the heads and tokens of k, and q a multiple of their heads")
    if keys == 0:
        raise ValueError("there are no keys")
    out = torch.empty(batch, queries, heads, value_dim, dtype=torch.bfloat16).transpose(1, 2)
    strides = [step for tensor in (q, k, v, out) for step in tensor.stride()[:3]]
    failed = library().qm_attention(
        _Shape(batch, heads, kv_heads, queries, keys, dim, value_dim, *strides),
        *(tensor.data_ptr() for tensor in (q, k, v, out)),
        scale,
        causal,
        torch.get_num_threads(),
    )
    if failed == -1:
        raise MemoryError(f"no memory for {keys} keys")
    if failed:
        raise ValueError(no_dots())
    return out
