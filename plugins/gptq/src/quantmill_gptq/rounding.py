"""Grids of scales and zero points, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.forms import Affine, Codes, Group
from quantmill_gptq.config import GptqConfig

__all__ = ["Grid", "fit", "grid_of", "make_form", "rounded", "stored"]

_SHRINKS = 24
_LEAST = 0.28
"""Ranges are tried from the full one down by steps of 3%, this many in all."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points, float32 ``[out, groups]``; scales are what float16 can hold."""

    scale: Tensor
    zero: Tensor


def fit(values: Tensor, top: int, symmetric: bool, exponent: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of ``values`` ``[out, n]``, float32 ``[out]`` each.

    Args:
        values: float32.
        top: the largest code.
        symmetric: the zero point is the middle code.
        exponent: the range is shrunk, row by row, to the one of least ``sum |error| ** exponent``;
            with 0 it is the full one.
    """
    low = values.amin(dim=1).clamp(max=0)
    high = values.amax(dim=1).clamp(min=0)
    best = _scale(low, high, top, symmetric)
    if exponent == 0:
        return best
    scale, zero = best
    least = _error(values, scale, zero, top, exponent)
    for step in range(1, _SHRINKS):
        share = 1 - step * (1 - _LEAST) / _SHRINKS
        tried, middle = _scale(low * share, high * share, top, symmetric)
        error = _error(values, tried, middle, top, exponent)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried, scale)
        zero = torch.where(better, middle, zero)
    return scale, zero


def stored(scale: Tensor) -> Tensor:
    """The nearest positive float16, as float32."""
    return scale.to(torch.float16).to(torch.float32).clamp(min=2.0**-24)


def _scale(low: Tensor, high: Tensor, top: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    # With the middle code for zero the range reaches as far down as up.
    scale = 2 * torch.maximum(high, -low) / top if symmetric else (high - low) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Codes are chosen for the scale that is stored.
    scale = stored(scale)
    if symmetric:
        return scale, torch.full_like(scale, (top + 1) / 2)
    return scale, torch.round(-low / scale).clamp(0, top)


def _error(values: Tensor, scale: Tensor, zero: Tensor, top: int, exponent: float) -> Tensor:
    wide, middle = scale.unsqueeze(1), zero.unsqueeze(1)
    error = (values / wide).add_(middle).round_().clamp_(0, top)
    error.sub_(middle).mul_(wide).sub_(values)
    if exponent == 2.0:
        return error.square_().sum(dim=1)
    return error.abs_().pow_(exponent).sum(dim=1)


def grid_of(weight: Tensor, width: int, config: GptqConfig) -> Grid:
    """The grid of consecutive groups of ``width`` columns of a float32 ``[out, in]``."""
    pairs = [fit(part, *config.grid) for part in weight.split(width, dim=1)]
    return Grid(
        torch.stack([scale for scale, _ in pairs], dim=1),
        torch.stack([zero for _, zero in pairs], dim=1),
    )


def rounded(
    weight: Tensor, grid: Grid, width: int, config: GptqConfig, dtype: torch.dtype
) -> Affine:
    """Every weight to the nearest point of its group's grid."""
    index = torch.arange(weight.shape[1], device=weight.device) // width
    scale, zero = grid.scale[:, index], grid.zero[:, index]
    codes = torch.round(weight / scale + zero).clamp(0, config.maximum)
    order = index.to(torch.int32) if config.desc_act else None
    return make_form(codes, grid, width, config, dtype, order)


def make_form(
    codes: Tensor,
    grid: Grid,
    width: int,
    config: GptqConfig,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> Affine:
    """The form of codes ``[out, in]``; ``order`` is the group of each column, or None."""
    return Affine(
        Codes.pack(codes.to(torch.uint8), config.bits, "dense"),
        grid.scale.to(torch.float16),
        Group(width),
        grid.zero.to(torch.uint8),
        "zero",
        order,
        dtype=dtype,
    )
