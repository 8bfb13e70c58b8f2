"""Rows of codes in 32-bit words, as GPTQ's checkpoint formats pack them.

*A stream* (``gptq``, ``gptq_v2``, at 2, 3, 4 and 8 bits): codes follow each other, the first in the
lowest bits; a code of 3 bits may cross words, and what the last word has left is zero.

*Planes* (``gptq_p``, at 3, 5, 6 and 7 bits): 32 codes take ``bits`` words, first those of the
codes' low bits, then those of the higher ones. Each plane is a stream of its own, and no field
crosses a word::

    3 bits   2 words of bits 0 and 1, 1 word of bit 2
    5 bits   4 words of bits 0 to 3, 1 word of bit 4
    6 bits   4 words of bits 0 to 3, 2 words of bits 4 and 5
    7 bits   4 words of bits 0 to 3, 2 words of bits 4 and 5, 1 word of bit 6

At 2, 4 and 8 bits the two are one. Source: GPTQModel 7.7, format ``gptq_p``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.forms import Codes
from quantmill_gptq.widths import BLOCK, PLANES, words

__all__ = ["fields", "packed"]


def packed(codes: Tensor, bits: int, planar: bool) -> Tensor:
    """int32 ``[rows, words]`` of uint8 codes ``[rows, count]``; in planes, ``count`` is a multiple
    of 32."""
    if not planar:
        return _stream(codes, bits)
    rows, count = codes.shape
    planes, offset = [], 0
    for width in PLANES[bits]:
        plane = _stream((codes >> offset) & (2**width - 1), width)
        planes.append(plane.reshape(rows, count // BLOCK, width))
        offset += width
    return torch.cat(planes, dim=2).reshape(rows, -1)


def fields(data: Tensor, bits: int, count: int, planar: bool) -> Tensor:
    """The uint8 codes ``[rows, count]`` of int32 words ``[rows, words]``."""
    if not planar:
        return _unstreamed(data, bits, count)
    rows = data.shape[0]
    codes = torch.zeros(rows, count, dtype=torch.uint8, device=data.device)
    offset = 0
    for width in PLANES[bits]:
        plane = data.reshape(rows, -1, bits)[:, :, offset : offset + width]
        codes |= _unstreamed(plane.reshape(rows, -1), width, count) << offset
        offset += width
    return codes


def _stream(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    whole = torch.nn.functional.pad(codes, (0, -count % (32 if bits == 3 else 32 // bits)))
    data = Codes.pack(whole.contiguous(), bits, "dense").data
    stream = data.view(torch.int32).reshape(rows, -1)
    return stream[:, : words(count, bits)].contiguous()


def _unstreamed(data: Tensor, bits: int, count: int) -> Tensor:
    pad = -data.shape[1] % (3 if bits == 3 else 1)
    whole = torch.nn.functional.pad(data, (0, pad)).contiguous()
    shape = (data.shape[0], whole.shape[1] * 32 // bits)
    return Codes(whole.view(torch.uint8).reshape(-1), bits, shape, "dense").unpack()[:, :count]
