"""ggml's tensor types, one small class each, by name."""

from __future__ import annotations

from typing import Final

from quantmill_gguf.types.affine import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from quantmill_gguf.types.base import BlockType
from quantmill_gguf.types.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K
from quantmill_gguf.types.lattice import (
    IQ1_M,
    IQ1_S,
    IQ2_S,
    IQ2_XS,
    IQ2_XXS,
    IQ3_S,
    IQ3_XXS,
)
from quantmill_gguf.types.plain import BF16, F16, F32, F64, I8, I16, I32, I64
from quantmill_gguf.types.raw import RawForm
from quantmill_gguf.types.tables import IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q1_0
from quantmill_gguf.types.ternary import Q2_0, TQ1_0, TQ2_0

__all__ = ["TYPES", "BlockType", "RawForm"]

_CLASSES: Final[tuple[type[BlockType], ...]] = (
    *(F32, F16, BF16, F64, I8, I16, I32, I64),
    *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K),
    *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S),
    *(IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q1_0, TQ1_0, TQ2_0, Q2_0),
)
TYPES: Final[dict[str, BlockType]] = {item.name: item() for item in _CLASSES}
"""Every type whose bytes can be decoded."""
