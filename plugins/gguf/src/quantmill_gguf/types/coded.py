"""Types whose values are codes on a grid: what the core's affine and codebook forms are made of."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from quantmill.forms import Codes
from quantmill_gguf.types.base import BlockType, Unpack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CodedType"]


class CodedType(BlockType):
    """Every value has a code of :attr:`bits` bits."""

    bits: ClassVar[int]

    @abstractmethod
    def codes(self, blocks: Tensor) -> Tensor:
        """uint8, or int8 for 8 bits, ``[blocks, block]`` of uint8 ``[blocks, block bytes]``."""

    def packed(self, raw: Tensor, unpack: Unpack | None = None) -> Codes:
        """The codes ``[rows, columns]`` of uint8 ``[rows, row bytes]`` as the core's forms have
        them: pairs, signed bytes, or a dense stream."""
        shape = (raw.shape[0], raw.shape[1] // self.info.size * self.info.block)
        packing = {4: "lo4", 8: "i8"}.get(self.bits, "dense")
        if unpack is not None and not raw.is_meta:
            made = Codes.empty(shape, self.bits, packing, raw.device)
            unpack(raw, type_name=self.name, out=made.data)
            return made
        return Codes.pack(self.codes(self.blocks(raw)).reshape(shape), self.bits, packing)
