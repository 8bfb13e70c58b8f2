"""Types whose elements stand for themselves."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantmill_gguf.types.base import BlockType

__all__ = ["BF16", "DTYPES", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "PlainType"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class PlainType(BlockType):
    """Numbers of one dtype."""

    makes = True

    def _decode(self, blocks: Tensor) -> Tensor:
        return self.values(blocks).to(torch.float32)

    def values(self, raw: Tensor) -> Tensor:
        """The numbers themselves, ``[rows, columns]`` of uint8 ``[rows, row bytes]``."""
        return raw.contiguous().view(DTYPES[self.name])

    def _quantize(self, values: Tensor, importance: Tensor | None) -> Tensor:
        if self.name.startswith("I"):
            values = values.round()
        return values.to(DTYPES[self.name]).contiguous().view(torch.uint8)


class F32(PlainType):
    """IEEE binary32."""

    name = "F32"


class F16(PlainType):
    """IEEE binary16."""

    name = "F16"


class BF16(PlainType):
    """The upper half of a binary32."""

    name = "BF16"


class F64(PlainType):
    """IEEE binary64."""

    name = "F64"


class I8(PlainType):
    """Signed, 8 bits."""

    name = "I8"


class I16(PlainType):
    """Signed, 16 bits."""

    name = "I16"


class I32(PlainType):
    """Signed, 32 bits."""

    name = "I32"


class I64(PlainType):
    """Signed, 64 bits."""

    name = "I64"
