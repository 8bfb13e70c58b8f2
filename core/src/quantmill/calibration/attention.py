"""Attention by a kernel of the registry, whatever module asks for it.

On CPUs :func:`torch.nn.functional.scaled_dot_product_attention` takes a third of a small model's
forward pass. It is replaced where frameworks look it up at each call. A mode that sees every
function of torch would also reach models that import it by name, but sees sixty thousand other
calls in a small calibration, which takes a twentieth of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantmill.kernels import KernelRegistry

__all__ = ["KernelAttention"]

_Attention = Callable[..., Tensor]


class KernelAttention:
    """Within it, attention without gradients, dropout or an explicit mask takes a kernel, if there
    is one for the device and dtype."""

    def __init__(self, kernels: KernelRegistry) -> None:
        self._kernels = kernels
        self._chosen: dict[tuple[str, torch.dtype], _Attention | None] = {}
        self._before: list[_Attention] = []

    def __enter__(self) -> None:
        plain = functional.scaled_dot_product_attention

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            found = self._attend(*args, **kwargs)
            return plain(*args, **kwargs) if found is None else found

        self._before.append(plain)
        functional.scaled_dot_product_attention = attend

    def __exit__(self, *error: object) -> None:
        functional.scaled_dot_product_attention = self._before.pop()

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """What a kernel gives, or None where this is none of its calls."""
        tensors = (query, key, value)
        if attn_mask is not None or dropout_p or any(tensor.ndim != 4 for tensor in tensors):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        dim = query.shape[3]
        kernel = self._kernel(query)
        if kernel is None or dim % 2 or any(tensor.stride(3) != 1 for tensor in tensors):
            return None
        if any(tensor.dtype != query.dtype or not tensor.numel() for tensor in tensors):
            return None
        if not enable_gqa and query.shape[1] != key.shape[1]:
            return None
        scale = 1 / math.sqrt(dim) if scale is None else scale
        return kernel(query, key, value, scale=scale, causal=is_causal)

    def _kernel(self, query: Tensor) -> _Attention | None:
        asked = query.device.type, query.dtype
        if asked not in self._chosen:
            dtype = str(query.dtype).removeprefix("torch.")
            choice = self._kernels.choose("attention", "tensor", {}, device=asked[0], dtype=dtype)
            self._chosen[asked] = None if choice is None else choice.load()
        return self._chosen[asked]
