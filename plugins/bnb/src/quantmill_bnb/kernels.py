"""bitsandbytes' own quantizer on CUDA as a kernel of the registry."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize_4bit"]


def quantize_4bit(
    block: Tensor, *, table: str, block_size: int, out_codes: Tensor, out_scale: Tensor
) -> int:
    """Quantize a flat CUDA tensor; see :mod:`quantmill.kernels` for the signature."""
    import bitsandbytes.functional as library

    finite = torch.isfinite(block)
    packed, state = library.quantize_4bit(block, blocksize=block_size, quant_type=table)
    out_codes.copy_(packed.reshape(-1))
    out_scale.copy_(state.absmax)
    if bool(finite.all()):
        return -1
    return int(torch.argmin(finite.to(torch.uint8)).item())
