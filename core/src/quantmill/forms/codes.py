"""Codes: small integers in memory, packed or one per byte.

``packing`` names how ``data`` holds them:

========  ============================================================================
``u8``    one unsigned code per byte, ``data`` has the tensor's shape
``i8``    one signed code per byte, ``data`` has the tensor's shape
``hi4``   two 4-bit codes per byte over the flattened tensor, the first in the high nibble;
          an odd count leaves the last low nibble unused
``lo4``   the same with the first code in the low nibble
========  ============================================================================

Disk layouts with other packings are a codec's business; those that kernels read directly are
added here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["Codes"]


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Integers of ``bits`` bits with the logical ``shape``."""

    data: Tensor
    bits: int
    shape: tuple[int, ...]
    packing: str = "u8"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.numel() * self.data.element_size()

    @property
    def count(self) -> int:
        """Number of codes."""
        return prod(self.shape)

    def unpack(self) -> Tensor:
        """The codes one per byte: uint8 (int8 for ``i8``), of the logical shape."""
        if self.packing in ("u8", "i8"):
            return self.data.reshape(self.shape)
        flat = self.data.reshape(-1).view(torch.uint8)
        high, low = flat >> 4, flat & 0x0F
        pair = (high, low) if self.packing == "hi4" else (low, high)
        if self.packing not in ("hi4", "lo4"):
            raise ValueError(f"unknown packing {self.packing!r}")
        return torch.stack(pair, dim=-1).reshape(-1)[: self.count].reshape(self.shape)

    @classmethod
    def pack(cls, codes: Tensor, bits: int, packing: str, *, pad: int = 0) -> Codes:
        """Pack codes (integers, any shape). ``hi4`` and ``lo4`` give ``uint8 [ceil(n / 2), 1]``;
        ``pad`` fills the unused half of the last byte."""
        shape = tuple(codes.shape)
        if packing in ("u8", "i8"):
            kind = torch.uint8 if packing == "u8" else torch.int8
            return cls(codes.to(kind), bits, shape, packing)
        flat = codes.reshape(-1).to(torch.uint8)
        if flat.numel() % 2:
            flat = torch.cat([flat, flat.new_full((1,), pad)])
        first, second = flat[::2], flat[1::2]
        if packing == "hi4":
            data = (first << 4) | second
        elif packing == "lo4":
            data = (second << 4) | first
        else:
            raise ValueError(f"unknown packing {packing!r}")
        return cls(data.reshape(-1, 1), bits, shape, packing)

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], bits: int, packing: str, device: str | torch.device = "cpu"
    ) -> Codes:
        """Uninitialised codes; on the ``meta`` device only their size."""
        if packing in ("u8", "i8"):
            kind = torch.uint8 if packing == "u8" else torch.int8
            return cls(torch.empty(shape, dtype=kind, device=device), bits, shape, packing)
        size = (prod(shape) + 1) // 2
        data = torch.empty((size, 1), dtype=torch.uint8, device=device)
        return cls(data, bits, shape, packing)

    def to(self, device: str | torch.device) -> Codes:
        """The same codes on another device."""
        return Codes(self.data.to(device), self.bits, self.shape, self.packing)
