"""The PTX that kernels of Triton and of its Gluon have in common: text, and its operands."""

from __future__ import annotations

from typing import Final

__all__ = ["BF16_PAIR", "FP16_PAIR", "PAIR_OPERANDS", "PREFETCH", "PREFETCH_OPERANDS"]

# $1 two words, $2 minus (exponent's value + zero) twice, $3 the shift, $5 the mask for both halves.
# The shift and the mask are constants that ptxas folds; $4 and $6 are their copies for the second
# word of a pair.
BF16_PAIR: Final = (
    "{ .reg .b32 t, one; shr.b32 t, $1, $3; lop3.b32 t, t, $5, 0x43004300, 0xEA;"
    " mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, t, one, $2; }"
)
FP16_PAIR: Final = (
    "{ .reg .b32 t, one; shr.b32 t, $1, $3; lop3.b32 t, t, $5, 0x64006400, 0xEA;"
    " mov.b32 one, 0x3C003C00; fma.rn.f16x2 $0, t, one, $2; }"
)
PAIR_OPERANDS: Final = "=r,r,r,r,r,r,r"

# $1 the address.
PREFETCH: Final = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
PREFETCH_OPERANDS: Final = "=r,l"
