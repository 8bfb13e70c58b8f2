"""Numbers and sizes of ggml's tensor types. Imports nothing: headers are read with this alone.

Source: ``enum ggml_type`` and the block structs of ggml, https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["BY_NAME", "BY_NUMBER", "PLAIN", "TypeSize"]


@dataclass(frozen=True, slots=True)
class TypeSize:
    """A type: ``block`` elements take ``size`` bytes."""

    name: str
    number: int
    block: int
    size: int
    words: tuple[tuple[int, int], ...] = ()
    """``(offset, width)`` of the multi-byte numbers of a block: what byte order concerns."""
    plain: str = ""
    """The safetensors code of a type that is no block type."""

    @property
    def bits(self) -> float:
        """Bits per element."""
        return 8 * self.size / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` elements, a multiple of ``block``."""
        return columns // self.block * self.size


def _plain(name: str, number: int, width: int) -> TypeSize:
    words = ((0, width),) if width > 1 else ()
    return TypeSize(name, number, 1, width, words, name)


_HALF = ((0, 2),)
_TWO_HALVES = ((0, 2), (2, 2))
_ALL: Final = (
    _plain("F32", 0, 4),
    _plain("F16", 1, 2),
    TypeSize("Q4_0", 2, 32, 18, _HALF),
    TypeSize("Q4_1", 3, 32, 20, _TWO_HALVES),
    TypeSize("Q5_0", 6, 32, 22, _HALF),
    TypeSize("Q5_1", 7, 32, 24, _TWO_HALVES),
    TypeSize("Q8_0", 8, 32, 34, _HALF),
    TypeSize("Q2_K", 10, 256, 84, ((80, 2), (82, 2))),
    TypeSize("Q3_K", 11, 256, 110, ((108, 2),)),
    TypeSize("Q4_K", 12, 256, 144, _TWO_HALVES),
    TypeSize("Q5_K", 13, 256, 176, _TWO_HALVES),
    TypeSize("Q6_K", 14, 256, 210, ((208, 2),)),
    TypeSize("Q8_K", 15, 256, 292, ((0, 4), *((260 + 2 * i, 2) for i in range(16)))),
    TypeSize("IQ2_XXS", 16, 256, 66, tuple((2 * i, 2) for i in range(33))),
    TypeSize("IQ2_XS", 17, 256, 74, tuple((2 * i, 2) for i in range(33))),
    TypeSize("IQ3_XXS", 18, 256, 98, _HALF),
    TypeSize("IQ1_S", 19, 256, 50, ((0, 2), *((34 + 2 * i, 2) for i in range(8)))),
    TypeSize("IQ4_NL", 20, 32, 18, _HALF),
    TypeSize("IQ3_S", 21, 256, 110, _HALF),
    TypeSize("IQ2_S", 22, 256, 82, _HALF),
    TypeSize("IQ4_XS", 23, 256, 136, _TWO_HALVES),
    _plain("I8", 24, 1),
    _plain("I16", 25, 2),
    _plain("I32", 26, 4),
    _plain("I64", 27, 8),
    _plain("F64", 28, 8),
    TypeSize("IQ1_M", 29, 256, 56),
    _plain("BF16", 30, 2),
    TypeSize("TQ1_0", 34, 256, 54, ((52, 2),)),
    TypeSize("TQ2_0", 35, 256, 66, ((64, 2),)),
    TypeSize("MXFP4", 39, 32, 17),
    TypeSize("NVFP4", 40, 64, 36),
    TypeSize("Q1_0", 41, 128, 18, _HALF),
    TypeSize("Q2_0", 42, 64, 18, _HALF),
)
BY_NUMBER: Final[dict[int, TypeSize]] = {item.number: item for item in _ALL}
BY_NAME: Final[dict[str, TypeSize]] = {item.name: item for item in _ALL}
PLAIN: Final = frozenset(item.name for item in _ALL if item.plain)
"""Types whose elements stand for themselves."""
