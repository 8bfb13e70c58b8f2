"""Byte order of tensor data: only the multi-byte numbers within a block are concerned."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill_gguf.types.sizes import TypeSize

__all__ = ["swapped"]


def swapped(raw: Tensor, info: TypeSize) -> Tensor:
    """A copy of whole blocks, uint8 of any shape, in the other byte order."""
    if not info.words:
        return raw
    order = list(range(info.size))
    for offset, width in info.words:
        order[offset : offset + width] = reversed(order[offset : offset + width])
    index = torch.tensor(order, device=raw.device)
    return raw.reshape(-1, info.size)[:, index].reshape(raw.shape)
