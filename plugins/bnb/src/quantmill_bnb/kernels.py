"""bitsandbytes' own quantizer on CUDA as a kernel of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmill.finite import first_non_finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["quantize_4bit"]


def quantize_4bit(
    block: Tensor, *, table: str, block_size: int, out_codes: Tensor, out_scale: Tensor
) -> Tensor:
    """Quantize a flat CUDA tensor; see :mod:`quantmill.kernels` for the signature."""
    import bitsandbytes.functional as library

    packed, state = library.quantize_4bit(block, blocksize=block_size, quant_type=table)
    out_codes.copy_(packed.reshape(-1))
    out_scale.copy_(state.absmax)
    return first_non_finite(block)
