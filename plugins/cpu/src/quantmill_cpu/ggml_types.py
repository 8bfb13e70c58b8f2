"""ggml's block types that the library knows: numbers and sizes, as ``c/ggml.h`` has them.

Imports nothing: the registrations name these types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["TYPES", "BlockSize"]


@dataclass(frozen=True, slots=True)
class BlockSize:
    """``values`` of a block take ``size`` bytes."""

    number: int
    values: int
    size: int
    made: bool
    """Whether there is an encoder."""
    points: int = 0
    """Coordinates of all points of its lattice."""
    bits: int = 0
    """Of its codes, where they lie on a grid."""


TYPES: Final[dict[str, BlockSize]] = {
    "Q4_0": BlockSize(2, 32, 18, True, bits=4),
    "Q4_1": BlockSize(3, 32, 20, True, bits=4),
    "Q5_0": BlockSize(6, 32, 22, True, bits=5),
    "Q5_1": BlockSize(7, 32, 24, True, bits=5),
    "Q8_0": BlockSize(8, 32, 34, True, bits=8),
    "Q2_K": BlockSize(10, 256, 84, True, bits=2),
    "Q3_K": BlockSize(11, 256, 110, True, bits=3),
    "Q4_K": BlockSize(12, 256, 144, True, bits=4),
    "Q5_K": BlockSize(13, 256, 176, True, bits=5),
    "Q6_K": BlockSize(14, 256, 210, True, bits=6),
    "Q8_K": BlockSize(15, 256, 292, False),
    "IQ2_XXS": BlockSize(16, 256, 66, False, 256 * 8),
    "IQ2_XS": BlockSize(17, 256, 74, False, 512 * 8),
    "IQ3_XXS": BlockSize(18, 256, 98, False, 256 * 4),
    "IQ1_S": BlockSize(19, 256, 50, False, 2048 * 8),
    "IQ4_NL": BlockSize(20, 32, 18, True, bits=4),
    "IQ3_S": BlockSize(21, 256, 110, False, 512 * 4),
    "IQ2_S": BlockSize(22, 256, 82, False, 1024 * 8),
    "IQ4_XS": BlockSize(23, 256, 136, True, bits=4),
    "IQ1_M": BlockSize(29, 256, 56, False, 2048 * 8),
    "TQ1_0": BlockSize(34, 256, 54, True),
    "TQ2_0": BlockSize(35, 256, 66, True, bits=2),
    "MXFP4": BlockSize(39, 32, 17, True, bits=4),
    "NVFP4": BlockSize(40, 64, 36, False, bits=4),
    "Q1_0": BlockSize(41, 128, 18, True, bits=1),
    "Q2_0": BlockSize(42, 64, 18, True, bits=2),
}
"""By ggml's name."""
