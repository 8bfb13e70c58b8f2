"""Which widths of codes GPTQ's checkpoint formats have, and how many words they take."""

from __future__ import annotations

from typing import Final

__all__ = ["BLOCK", "PLANAR_ONLY", "PLANES", "is_planar", "period", "widths", "words"]

PLANAR_ONLY: Final = (5, 6, 7)
"""Widths that only the planar format has."""
_STREAMS: Final = (2, 3, 4, 8)
PLANES: Final = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of the planes of the widths that have several, the lowest first."""
BLOCK: Final = 32
"""Codes whose planes lie together."""


def widths(checkpoint_format: str) -> tuple[int, ...]:
    """Bits per code that a checkpoint format has."""
    return tuple(sorted(_STREAMS + PLANAR_ONLY)) if checkpoint_format == "gptq_p" else _STREAMS


def is_planar(checkpoint_format: str, bits: int) -> bool:
    """Whether a checkpoint format keeps codes of ``bits`` in planes."""
    return checkpoint_format == "gptq_p" and bits in PLANES


def period(bits: int) -> int:
    """Codes that fill whole words."""
    return 32 // bits if bits in (2, 4, 8) else BLOCK


def words(count: int, bits: int) -> int:
    """Words of a row of so many codes."""
    return -(-count * bits // 32)
