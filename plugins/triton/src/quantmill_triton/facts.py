"""What a kernel has to know about a prepared weight, as plain integers.

The facts follow from the form's structure and the tensors' shapes alone, so they are the same for
a form on the meta device.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ROWS", "Facts", "slice_width"]

ROWS = 64
"""Rows of the weight in one tile of the layout; see :mod:`quantmill_triton.layout`."""


class Facts(NamedTuple):
    """Facts of one prepared weight ``[rows, columns]``."""

    rows: int
    columns: int
    bits: int
    """Bits of a code in the lower plane."""
    high_bits: int
    """Bits of a code in the upper plane; 0 when there is only one."""
    width: int
    """Columns of a slice: so many neighbouring words hold one slice in the same bits."""
    slices: int
    """Slices of a chunk; ``width * slices`` columns lie in one tile."""
    group: int
    """Columns that share a scale, 0 for the whole row."""
    tall: int
    """Rows that share a scale: 1, a block's rows, or 0 for all."""
    groups: int
    """Rows of the scale tensor: groups along the columns."""
    lanes: int
    """Columns of the scale tensor: rows of the weight, padded, or blocks of rows."""
    values: int
    """What codes are: 0 integers, 1 indices of a table, 2 float8_e4m3fn, 3 float8_e5m2."""
    scales: int
    """Dtype of scales: 0 float32, 1 bfloat16, 2 float16, 3 float8_e8m0fnu."""
    offset: int
    """0 none, 1 a small integer zero beside each scale, 2 any zero, 3 an additive minimum."""
    middle: int
    """Subtracted from codes besides: 128 where they were signed bytes."""
    paired: int
    """1 when neighbouring columns lie in one word (16-entry tables)."""
    ordered: int
    """1 when columns are sorted by group (act-order)."""

    @property
    def chunk(self) -> int:
        """Columns of one tile."""
        return self.width * self.slices

    @property
    def chunks(self) -> int:
        """Tiles along a row."""
        return -(-self.columns // self.chunk)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns with the padding to whole tiles."""
        return -(-self.rows // ROWS) * ROWS, self.chunks * self.chunk

    @property
    def flush(self) -> int:
        """Columns after which a partial sum is scaled: they lie in one group and one chunk."""
        if self.group == 0 or self.group % self.chunk == 0:
            return self.chunk
        return self.group if self.chunk % self.group == 0 else self.width


def slice_width(slices: int, group: int, columns: int, several: bool) -> int:
    """Columns of a slice, 16 to 64: wide tiles without much padding, each slice in one group.

    A tile has at most 512 columns, and at most two groups unless ``several``: scales that stand
    alone are loaded two ahead, pairs in any number.
    """
    widths = [16]
    for width in (32, 64):
        of_groups = not group or (width <= group and (several or slices * width <= 2 * group))
        if of_groups and slices * width <= 512:
            widths.insert(0, width)
    padding = {width: -columns % (slices * width) for width in widths}
    for width in widths:
        if padding[width] * 32 <= columns:
            return width
    return min(widths, key=lambda width: (padding[width], -width))
