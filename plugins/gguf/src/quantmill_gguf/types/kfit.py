"""K-quants from values: fits of each group, joined into super-blocks.

The algorithms of ggml's quantizers (``quantize_row_q4_K_ref`` and ``..._impl`` and their like in
``ggml-quants.c``), which differ with and without importance: with it, the scales of a block are
fitted too, not only rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantmill_gguf.types.affine import Scales
from quantmill_gguf.types.search import (
    TINY,
    divide,
    farthest,
    fit_positive,
    fit_range,
    fit_symmetric,
    fit_third_bit,
    in_order,
    nearest,
    square_root,
)

__all__ = ["columns", "fit_q3", "fit_q6", "fit_ranged", "mean_square", "spread_weights"]


def columns(values: Tensor, width: int) -> Tensor:
    """``[blocks, values]`` as ``[width, groups of all blocks]``."""
    return values.reshape(-1, width).t().contiguous()


def mean_square(values: Tensor, factor: float) -> Tensor:
    """The mean square of each block, times ``factor``: float32 ``[blocks, 1]``."""
    total = in_order((values * values).t().contiguous())
    return divide(factor * total, float(values.shape[1])).unsqueeze(1)


def spread_weights(values: Tensor, importance: Tensor, energy: Tensor) -> Tensor:
    """How much an error of each value costs: ``importance * sqrt(energy + value ** 2)``.

    Args:
        values: float32 ``[blocks, block]``.
        importance: the same shape.
        energy: ``[blocks, 1]``.
    """
    return importance * square_root(energy + values * values)


def _levels(values: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Scales ``[blocks, groups]`` rounded to ``0 ... top`` steps of the block's largest."""
    most = values.amax(dim=1, keepdim=True).clamp(min=0.0) + 0.0  # no minus zero
    some = most > 0
    inverse = divide(top, most).masked_fill(~some, 0.0)
    # As a byte would hold it: a negative scale, which no fit gives, is a large one.
    steps = nearest(inverse * values).to(torch.int32).bitwise_and_(255).clamp_(max=int(top))
    return steps.to(torch.uint8), divide(most, top).to(torch.float16)


def _fitted(values: Tensor, top: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    fit = fit_positive(values.t().contiguous(), top, weights.t().contiguous())
    return fit.codes.t().to(torch.uint8), fit.scale.to(torch.float16).unsqueeze(1)


def _coded(values: Tensor, scale: Tensor, low: int, high: int, searched: Tensor) -> Tensor:
    """Codes ``[width, groups]`` for the rounded scales; where those are 0, what was found."""
    codes = nearest(divide(values, scale)).clamp_(low, high) - low
    return torch.where(scale == 0, searched, codes)


def fit_ranged(
    values: Tensor,
    importance: Tensor | None,
    *,
    bits: int,
    groups: int,
    levels: int,
    plain_weights: Callable[[Tensor], Tensor],
    search: tuple[float, float, int, bool],
    energy: float,
) -> tuple[Tensor, Scales]:
    """Types with a scale and a minimum for each group.

    Args:
        values: float32 ``[blocks, 256]``.
        importance: the same shape, or None.
        bits: of a code.
        groups: of a block.
        levels: the largest step of a scale.
        plain_weights: weights of ``[width, groups]`` values where there is no importance.
        search: first level, step, steps and whether errors are absolute, without importance.
        energy: factor of the mean square in the weights, with importance.
    """
    blocks, width, top = values.shape[0], values.shape[1] // groups, 2**bits - 1
    work = columns(values, width)
    if importance is None:
        first, step, steps, absolute = search
        fit = fit_range(
            work,
            top,
            plain_weights(work),
            first=first,
            step=step,
            steps=steps,
            absolute=absolute,
        )
        scales, d = _levels(fit.scale.reshape(blocks, groups), levels)
        minima, low = _levels(fit.low.reshape(blocks, groups), levels)
    else:
        spread = spread_weights(values, importance, mean_square(values, energy))
        weights = columns(spread, width)
        fit = fit_range(work, top, weights, first=-0.9, step=0.05, steps=36)
        sums = in_order(weights).reshape(blocks, groups)
        scales, d = _fitted(fit.scale.reshape(blocks, groups), levels, sums)
        minima, low = _fitted(fit.low.reshape(blocks, groups), levels, sums)
    scale = (d.to(torch.float32) * scales.to(torch.float32)).reshape(-1)
    minimum = (low.to(torch.float32) * minima.to(torch.float32)).reshape(-1)
    codes = _coded(work + minimum, scale, 0, top, fit.codes)
    return codes.t().to(torch.uint8).reshape(blocks, -1), Scales(d, scales, low, minima)


def fit_q3(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Scales]:
    """Q3_K: signed 6-bit scales of groups of 16."""
    blocks, groups = values.shape[0], 16
    work = columns(values, 16)
    if importance is None:
        fit = fit_third_bit(work, 4)
        scale = fit.scale.reshape(blocks, groups)
        largest = farthest(scale.t()).unsqueeze(1)
        inverse = divide(-32.0, largest)
        none = largest == 0
        steps = nearest(inverse * scale).clamp_(-32, 31).masked_fill(none, -32)
        d = divide(1.0, inverse).masked_fill(none, 0.0).to(torch.float16)
    else:
        spread = spread_weights(values, importance, mean_square(values, 2.0))
        weights = columns(spread, 16)
        fit = fit_symmetric(work, 4, weights)
        sums = in_order(weights).reshape(blocks, groups)
        joined = fit_symmetric(
            fit.scale.reshape(blocks, groups).t().contiguous(), 32, sums.t().contiguous()
        )
        steps = joined.codes.t() - 32
        d = joined.scale.to(torch.float16).unsqueeze(1)
    scale = (d.to(torch.float32) * steps).reshape(-1)
    codes = _coded(work, scale, -4, 3, fit.codes)
    return codes.t().to(torch.uint8).reshape(blocks, -1), Scales(d, steps.to(torch.int8))


def fit_q6(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Scales]:
    """Q6_K: signed 8-bit scales of groups of 16."""
    blocks, groups = values.shape[0], 16
    work = columns(values, 16)
    weights = work * work if importance is None else columns(importance, 16)
    fit = fit_symmetric(work, 32, weights)
    scale = fit.scale.reshape(blocks, groups)
    largest = farthest(scale.t()).unsqueeze(1)
    none = largest.abs() < TINY
    inverse = divide(-128.0, largest)
    d = divide(1.0, inverse).masked_fill(none, 0.0).to(torch.float16)
    steps = nearest(inverse * scale).clamp_(max=127).masked_fill(none, 0.0)
    rounded = (d.to(torch.float32) * steps).reshape(-1)
    codes = _coded(work, rounded, -32, 31, fit.codes).t().reshape(blocks, -1)
    codes = codes.masked_fill(none, 0.0)
    return codes.to(torch.uint8), Scales(d, steps.to(torch.int8))
