"""Codes packed, unpacked and laid in panels by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.forms import Codes
from quantmill_cpu.buffers import address
from quantmill_cpu.native import library

__all__ = [
    "PACKINGS",
    "pack_codes",
    "panels_of",
    "panels_of_groups",
    "panels_of_values",
    "panels_size",
    "panels_to",
    "panels_to_groups",
    "unpack_codes",
]

PACKINGS = {"u8": 0, "i8": 1, "hi4": 2, "lo4": 3, "dense": 4}
"""Numbers of the packings in the library."""


def _bytes(data: Tensor, count: int) -> Tensor:
    """``count`` bytes that the library may read."""
    flat = data.contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type != "cpu" or flat.numel() < count:
        raise ValueError(
            f"{count} bytes on the CPU are needed, not {flat.numel()} on {flat.device}"
        )
    return flat


def _size(count: int, bits: int, packing: str) -> int:
    width = {"u8": 8, "i8": 8, "dense": bits}.get(packing, 4)
    return (count * width + 7) // 8


def unpack_codes(codes: Codes) -> Tensor:
    """Codes one per byte, as :meth:`quantmill.forms.Codes.unpack` gives them."""
    count = codes.count
    data = _bytes(codes.data, _size(count, codes.bits, codes.packing))
    if codes.packing in ("u8", "i8"):
        return codes.unpack()
    out = torch.empty(codes.shape, dtype=torch.uint8)
    library().qm_codes_unpack(
        data.data_ptr(), PACKINGS[codes.packing], codes.bits, 0, count, out.data_ptr()
    )
    return out


def pack_codes(codes: Tensor, bits: int, packing: str) -> Codes:
    """Unsigned codes in range, any shape, as :meth:`quantmill.forms.Codes.pack` packs them."""
    shape, count = tuple(codes.shape), codes.numel()
    if packing in ("u8", "i8"):
        return Codes.pack(codes, bits, packing)
    source = _bytes(codes.to(torch.uint8), count)
    made = Codes.empty(shape, bits, packing)
    library().qm_codes_pack(source.data_ptr(), PACKINGS[packing], bits, count, made.data.data_ptr())
    return made


def panels_size(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of the panels of codes ``[rows, columns]``."""
    rows, columns = shape
    return -(-rows // 16) * -(-columns // 32) * 64 * bits


def panels_of(codes: Codes, order: Tensor | None, pad: int, out: Tensor) -> None:
    """Lay codes ``[rows, columns]`` in panels, uint8 ``[panels_size]``; ``order`` (int32) sorts the
    columns, ``pad`` is the code that fills the rest."""
    rows, columns = codes.shape
    data = _bytes(codes.data, _size(codes.count, codes.bits, codes.packing))
    assert out.is_contiguous() and out.numel() == panels_size(codes.shape, codes.bits)
    library().qm_panels_pack(
        data.data_ptr(),
        PACKINGS[codes.packing],
        codes.bits,
        rows,
        columns,
        None if order is None else order.data_ptr(),
        pad,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def panels_to(panels: Tensor, like: Codes, order: Tensor | None) -> Tensor:
    """The bytes ``[n]`` of packed codes as ``like`` (on the meta device) says; bits of the last
    byte that no code uses are zero."""
    rows, columns = like.shape
    source = _bytes(panels, panels_size(like.shape, like.bits))
    out = torch.empty(_size(like.count, like.bits, like.packing), dtype=torch.uint8)
    library().qm_panels_unpack(
        source.data_ptr(),
        PACKINGS[like.packing],
        like.bits,
        rows,
        columns,
        None if order is None else order.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def panels_of_values(values: Tensor) -> Tensor:
    """Values ``[rows, groups]`` of 1, 2 or 4 bytes as ``[panels, groups, 16]``, with zeros below
    the last row."""
    rows, groups = values.shape
    out = values.new_empty((-(-rows // 16), groups, 16))
    library().qm_panels_values(
        address(values, values.dtype, rows * groups, "values"),
        values.itemsize,
        rows,
        groups,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _group_panels(codes: Codes) -> tuple[int, int, int]:
    """Panels of codes of groups, the bytes that :func:`panels_of` makes of each, and those of them
    that hold codes: where there is one plane, vectors beyond the last group are left out."""
    rows, groups = codes.shape
    panels, chunks, rest = -(-rows // 16), -(-groups // 32), groups % 32
    whole = used = chunks * 64 * codes.bits
    if rest and codes.bits in (1, 2, 4, 8):
        used -= 64 * (codes.bits - -(-rest * codes.bits // 32))
    return panels, whole, used


def panels_of_groups(codes: Codes) -> Tensor:
    """Codes ``[rows, groups]`` of scales or offsets in panels (``c/matmul.h``), uint8 ``[n]``."""
    panels, whole, used = _group_panels(codes)
    if codes.data.is_meta:
        return torch.empty(panels * used, dtype=torch.uint8, device="meta")
    out = torch.empty(panels * whole, dtype=torch.uint8)
    panels_of(codes, None, 0, out)
    return out.reshape(panels, whole)[:, :used].reshape(-1)


def panels_to_groups(data: Tensor, like: Codes) -> Tensor:
    """The inverse of :func:`panels_of_groups`, as :func:`panels_to` gives it."""
    panels, whole, used = _group_panels(like)
    wide = data.new_zeros((panels, whole))
    wide[:, :used] = data.reshape(panels, used)
    return panels_to(wide.reshape(-1), like, None)
