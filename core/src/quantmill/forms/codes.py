"""Codes: small integers in memory, packed or one per byte.

``packing`` names how ``data`` holds them:

=========  ===========================================================================
``u8``     one unsigned code per byte, ``data`` has the tensor's shape
``i8``     one signed code per byte, ``data`` has the tensor's shape
``hi4``    two 4-bit codes per byte over the flattened tensor, the first in the high nibble;
           an odd count leaves the last low nibble unused
``lo4``    the same with the first code in the low nibble
``dense``  a stream of ``bits``-bit codes over the flattened tensor, the first in the lowest bits
           of the first byte; a code may cross bytes, unused bits of the last byte are zero.
           With 4 bits it is ``lo4``.
=========  ===========================================================================

Disk layouts with other packings are a codec's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

__all__ = ["Codes"]

_CHUNK = 1 << 18
"""Codes converted at a time: the temporaries are wider than the codes."""


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
        if self.packing == "dense" and self.bits != 4:
            return _unpack_dense(flat, self.bits, self.count).reshape(self.shape)
        high, low = flat >> 4, flat & 0x0F
        pair = (high, low) if self.packing == "hi4" else (low, high)
        if self.packing not in ("hi4", "lo4", "dense"):
            raise ValueError(f"unknown packing {self.packing!r}")
        return torch.stack(pair, dim=-1).reshape(-1)[: self.count].reshape(self.shape)

    @classmethod
    def pack(cls, codes: Tensor, bits: int, packing: str, *, pad: int = 0) -> Codes:
        """Pack codes (integers in range, any shape). ``hi4`` and ``lo4`` give ``uint8
        [ceil(n / 2), 1]``, ``dense`` gives ``uint8 [ceil(n * bits / 8)]``; ``pad`` fills the
        unused half of the last byte of ``hi4`` and ``lo4``."""
        shape = tuple(codes.shape)
        if packing in ("u8", "i8"):
            kind = torch.uint8 if packing == "u8" else torch.int8
            return cls(codes.to(kind), bits, shape, packing)
        flat = codes.reshape(-1).to(torch.uint8)
        if packing == "dense":
            return cls(_pack_dense(flat, bits), bits, shape, packing)
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

    @staticmethod
    def packing_bytes(count: int, bits: int) -> int:
        """Memory that :meth:`pack` takes for so many codes to make the ``dense`` packing, with its
        result."""
        if bits == 8:
            return count
        if bits in (1, 2, 4):
            return 2 * count
        return (3 + bits) * count // 8

    @staticmethod
    def unpacking_bytes(count: int, bits: int) -> int:
        """The same of :meth:`unpack`."""
        return 2 * count if bits == 4 else count + 40 * min(count, _CHUNK)

    @staticmethod
    def reordering_bytes(count: int, bits: int) -> int:
        """The same of unpacking, putting in another order, and packing."""
        return max(3 * count, count + Codes.packing_bytes(count, bits))

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], bits: int, packing: str, device: str | torch.device = "cpu"
    ) -> Codes:
        """Uninitialised codes; on the ``meta`` device only their size."""
        if packing in ("u8", "i8"):
            kind = torch.uint8 if packing == "u8" else torch.int8
            return cls(torch.empty(shape, dtype=kind, device=device), bits, shape, packing)
        if packing == "dense":
            size = (prod(shape) * bits + 7) // 8
            data = torch.empty(size, dtype=torch.uint8, device=device)
            return cls(data, bits, shape, packing)
        size = (prod(shape) + 1) // 2
        data = torch.empty((size, 1), dtype=torch.uint8, device=device)
        return cls(data, bits, shape, packing)

    def cut(self, first: int, last: int) -> Codes | None:
        """Rows ``first`` to ``last`` of a matrix, sharing memory; None where a row does not begin
        at a byte."""
        rest = self.shape[1:]
        shape = (last - first, *rest)
        if self.packing in ("u8", "i8"):
            return Codes(self.data.reshape(self.shape)[first:last], self.bits, shape, self.packing)
        bits = 4 if self.packing in ("hi4", "lo4") else self.bits
        if prod(rest) * bits % 8:
            return None
        width = prod(rest) * bits // 8
        part = self.data.reshape(-1)[first * width : last * width]
        column = self.packing in ("hi4", "lo4")
        return Codes(part.reshape(-1, 1) if column else part, self.bits, shape, self.packing)

    def to(self, device: str | torch.device) -> Codes:
        """The same codes on another device."""
        return Codes(self.data.to(device), self.bits, self.shape, self.packing)

    def repacked(self, packing: str) -> Codes:
        """The same codes in another packing."""
        if packing == self.packing:
            return self
        if "i8" in (packing, self.packing):
            raise ValueError("signed codes are not repacked: their values would change")
        return Codes.pack(self.unpack(), self.bits, packing)


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which a dense stream is at a byte's start again."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def _pack_dense(flat: Tensor, bits: int) -> Tensor:
    if bits in (1, 2, 4, 8):
        return _pack_whole(flat, bits)
    # Eight codes fill bytes.
    size = (flat.numel() * bits + 7) // 8
    whole = flat.numel() // 8 * 8
    out = torch.empty(size, dtype=torch.uint8, device=flat.device)
    edge = whole // 8 * bits
    _pack_runs(flat[:whole].reshape(-1, 8), bits, out[:edge].view(-1, bits))
    if edge < size:
        last = flat.new_zeros(1, 8)
        last[0, : flat.numel() - whole] = flat[whole:]
        end = out.new_empty(1, bits)
        _pack_runs(last, bits, end)
        out[edge:] = end[0, : size - edge]
    return out


def _pack_runs(runs: Tensor, bits: int, out: Tensor) -> None:
    """Codes ``[n, 8]`` as bytes ``[n, bits]``, byte by byte: nothing wider is made of them."""
    for byte in range(bits):
        first, last = byte * 8 // bits, (byte * 8 + 7) // bits
        total = runs[:, first] >> (byte * 8 - first * bits)
        for index in range(first + 1, last + 1):
            total |= runs[:, index] << (index * bits - byte * 8)
        out[:, byte] = total


def _pack_whole(flat: Tensor, bits: int) -> Tensor:
    """Codes of which whole ones fill a byte, without leaving bytes."""
    codes = 8 // bits
    if flat.numel() % codes:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % codes)])
    if codes == 1:
        return flat.clone()
    if flat.storage_offset() % codes:
        flat = flat.clone()
    if bits == 1:
        parts = flat.reshape(-1, codes)
        packed = parts[:, 0].clone()
        for index in range(1, codes):
            packed |= parts[:, index] << (bits * index)
        return packed
    # Codes of a byte as one number, each moved down to its place: their bytes' other bits are 0.
    words = flat.view(torch.int16 if bits == 4 else torch.int32)
    packed = words.clone()
    for index in range(1, codes):
        packed |= words >> ((8 - bits) * index)
    return packed.to(torch.uint8)


def _unpack_dense(data: Tensor, bits: int, count: int) -> Tensor:
    codes, size = _period(bits)
    out = torch.empty(count, dtype=torch.uint8, device=data.device)
    step = _CHUNK // codes * codes
    mask = (1 << bits) - 1
    for start in range(0, count, step):
        stop = min(count, start + step)
        part = data[start * bits // 8 : (stop * bits + 7) // 8]
        rest = -part.numel() % size
        if rest:
            part = torch.cat([part, part.new_zeros(rest)])
        part = part.reshape(-1, size).to(torch.int64)
        word = torch.zeros(part.shape[0], dtype=torch.int64, device=data.device)
        for index in range(size):
            word |= part[:, index] << (8 * index)
        spread = torch.stack([(word >> (bits * index)) & mask for index in range(codes)], dim=1)
        out[start:stop] = spread.to(torch.uint8).reshape(-1)[: stop - start]
    return out
