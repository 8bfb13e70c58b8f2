"""An affine form made of row blocks: rounding whose memory does not grow with the rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from quantmill.forms.affine import Affine
from quantmill.forms.codes import Codes

__all__ = ["join_rows", "lowest_edge", "take_lowest", "whole_bytes"]


def whole_bytes(columns: int, bits: int) -> int:
    """Rows of so many codes after which a byte of the ``dense`` packing ends."""
    return 8 // gcd(8, columns * bits)


def take_lowest(scaled: Tensor, least: float) -> None:
    """Set values to ``least`` that lie between it and the next code but for a scale's rounding.

    A symmetric scale that is the range over its whole length puts the lowest weight of a group
    right between its two lowest codes: which one it takes would be the rounded scale's decision.

    Args:
        scaled: weights over their scale, float32; changed in place.
        least: the lowest code.
    """
    scaled.masked_fill_(scaled <= lowest_edge(least), least)


def lowest_edge(least: float) -> float:
    """The largest value that :func:`take_lowest` sets."""
    return (least + 0.5) * (1 - 2**-8)


def join_rows(parts: Iterable[tuple[int, Affine]], rows: int) -> Affine:
    """One form ``[rows, in]`` of forms of consecutive rows, each with the row that it starts at.

    Parts have ``dense`` codes, one scale and offset per row and group, and begin where a byte
    does; they are taken one at a time.
    """
    whole: Affine | None = None
    for start, part in parts:
        assert isinstance(part.scale, Tensor) and part.codes.packing == "dense"
        count, columns = part.shape
        if whole is None:
            bits, device = part.codes.bits, part.scale.device
            whole = replace(
                part,
                codes=Codes.empty((rows, columns), bits, "dense", device),
                scale=_grown(part.scale, rows),
                offset=_grown(part.offset, rows) if isinstance(part.offset, Tensor) else None,
            )
        for into, of in ((whole.scale, part.scale), (whole.offset, part.offset)):
            if isinstance(into, Tensor) and isinstance(of, Tensor):
                into[start : start + count] = of
        first = start * columns * part.codes.bits // 8
        data = part.codes.data.reshape(-1)
        whole.codes.data.reshape(-1)[first : first + data.numel()] = data
    assert whole is not None, "a weight has rows"
    return whole


def _grown(values: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, *values.shape[1:]), dtype=values.dtype, device=values.device)
