"""What a ternary weight is: the form, without files and without a way to get there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from quantmill.forms import Form
from torch import Tensor
from torch.nn import functional

__all__ = ["TRITS", "Ternary", "pack", "unpack"]

TRITS = 5
"""Trits of a byte: 3**5 is 243, so a weight costs 1.6 bits and the bytes 243 to 255 mean nothing."""


@dataclass(frozen=True)
class Ternary(Form):
    """``trit * scale``, a trit being -1, 0 or 1, in float32 with one rounding at the end.

    Five trits of a row lie in a byte, the first one in the lowest place of base 3, each plus one; the
    last byte of a row is filled up with zeros. ``group_size`` weights of a row share a scale.
    """

    kind: ClassVar[str] = "ternary"

    packed: Tensor
    """uint8 ``[out, ceil(in / 5)]``."""
    scale: Tensor
    """float32 ``[out, ceil(in / group_size)]``."""
    group_size: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._rows(self.packed, self.scale).to(dtype or self.dtype)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        flat = index.reshape(-1)
        found = self._rows(self.packed[flat], self.scale[flat]).to(dtype or self.dtype)
        return found.reshape(*index.shape, self.shape[1])

    def _rows(self, packed: Tensor, scale: Tensor) -> Tensor:
        columns = self.shape[1]
        trits = unpack(packed, columns).to(torch.float32)
        return trits * scale.repeat_interleave(self.group_size, dim=1)[:, :columns]

    def traits(self) -> Mapping[str, Any]:
        return {"bits": 1.6, "grouping": "group", "group_size": self.group_size}


def pack(trits: Tensor) -> Tensor:
    """Trits ``[rows, columns]`` (-1, 0, 1) as bytes ``[rows, ceil(columns / 5)]``."""
    filled = functional.pad(trits.to(torch.int16), (0, -trits.shape[1] % TRITS)) + 1
    places = 3 ** torch.arange(TRITS, dtype=torch.int16, device=trits.device)
    return (filled.reshape(trits.shape[0], -1, TRITS) * places).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse: int8 ``[rows, columns]``."""
    left = packed.to(torch.int16)
    found = []
    for _ in range(TRITS):
        found.append(left % 3)
        left = left // 3
    trits = torch.stack(found, -1).reshape(packed.shape[0], -1)
    return (trits[:, :columns] - 1).to(torch.int8)
