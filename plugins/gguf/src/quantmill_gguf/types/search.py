"""Searches for the scales of a group of values: the algorithms of ggml's quantizers.

The definition of what native kernels do, vectorised over groups. Values are ``[n, groups]``, so
that a sum over a group adds rows, one after the other as ggml's C does: the same float32
operations in the same order give the same bytes, on every device.

Source: ``make_qx_quants``, ``make_q3_quants``, ``make_qkx2_quants``, ``make_qp_quants`` of ggml
(``ggml-quants.c``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Fit",
    "RangeFit",
    "divide",
    "farthest",
    "fit_positive",
    "fit_range",
    "fit_symmetric",
    "fit_third_bit",
    "in_order",
    "lowest",
    "nearest",
    "square_root",
]

TINY = 1e-15
"""Groups whose values are all smaller are groups of zeros."""


def f32(value: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def nearest(values: Tensor) -> Tensor:
    """To the nearest integer, ties to even, as ggml finds it: what is beyond ``2**22`` wraps
    around."""
    bits = (values + 12582912.0).view(torch.int32)
    return bits.bitwise_and_(0x7FFFFF).sub_(0x400000).to(torch.float32)


def divide(value: Tensor | float, by: Tensor | float) -> Tensor:
    """IEEE division. Of a number and a tensor PyTorch would multiply with the reciprocal."""
    like = value if isinstance(value, Tensor) else by
    assert isinstance(like, Tensor)
    left, right = (
        item if isinstance(item, Tensor) else torch.full((), item, device=like.device)
        for item in (value, by)
    )
    return torch.true_divide(left, right)


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded, which PyTorch's own is not everywhere; by way of float64 it is."""
    return torch.sqrt(values.to(torch.float64)).to(torch.float32)


def in_order(terms: Tensor) -> Tensor:
    """Sum over the first dimension, one by one."""
    total = terms[0].clone()
    for index in range(1, terms.shape[0]):
        total += terms[index]
    return total


def farthest(values: Tensor) -> Tensor:
    """The first value of the largest magnitude in each group, ``[groups]``; no minus zero."""
    size = values.abs()
    return _first(values, size == size.amax(dim=0)) + 0.0


def lowest(values: Tensor) -> Tensor:
    """The first of the lowest values in each group, ``[groups]``: zeros have signs."""
    return _first(values, values == values.amin(dim=0))


def _first(values: Tensor, wanted: Tensor) -> Tensor:
    # argmax may answer with any of several equals.
    order = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    first = torch.where(wanted, order, values.shape[0] - 1).amin(dim=0)
    return values.gather(0, first.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True, slots=True)
class Fit:
    """A scale per group and the codes that were found with it."""

    scale: Tensor
    """float32 ``[groups]``."""
    codes: Tensor
    """float32 ``[n, groups]``, whole numbers from 0 on."""


@dataclass(frozen=True, slots=True)
class RangeFit:
    """``value = code * scale - low``."""

    scale: Tensor
    low: Tensor
    """float32 ``[groups]``, not negative: what is subtracted."""
    codes: Tensor


def fit_symmetric(values: Tensor, half: int, weights: Tensor) -> Fit:
    """Codes ``0 ... 2 half - 1`` around ``half``.

    Nineteen scales around the one that gives the largest value the lowest code; of each, the best
    least-squares scale of the codes it leads to.
    """
    top = farthest(values)
    zero = top.abs() < TINY
    weighted = weights * values
    inverse = divide(-float(half), top)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        codes = nearest(inverse * values).clamp_(-half, half - 1)
        return in_order(weighted * codes), in_order(weights * codes * codes)

    found = inverse
    product, square = sums(inverse)
    scale = torch.where(square != 0, product / square, torch.zeros_like(square))
    best = scale * product
    for step in (*range(-9, 0), *range(1, 10)):
        inverse = -divide(f32(half + f32(f32(0.1) * step)), top)
        product, square = sums(inverse)
        better = (square > 0) & (product * product > best * square)
        candidate = product / square
        scale = torch.where(better, candidate, scale)
        best = torch.where(better, candidate * product, best)
        found = torch.where(better, inverse, found)
    codes = nearest(found * values).clamp_(-half, half - 1) + half
    return Fit(scale.masked_fill(zero, 0.0), codes.masked_fill(zero, 0.0))


def fit_third_bit(values: Tensor, half: int) -> Fit:
    """Like :func:`fit_symmetric` with squares as weights: from one scale on, single codes move
    while that lowers the error, at most five times around."""
    top = farthest(values)
    zero = top.abs() < TINY
    weights = values * values
    weighted = weights * values
    codes = nearest(divide(-float(half), top) * values).clamp_(-half, half - 1)
    product, square = in_order(weighted * codes), in_order(weights * codes * codes)
    for _ in range(5):
        changed = torch.zeros_like(zero)
        for index in range(values.shape[0]):
            value, weight, old = values[index], weights[index], codes[index]
            rest = product - weighted[index] * old
            rest_square = square - weight * old * old
            new = nearest(value * rest_square / rest).clamp_(-half, half - 1)
            new_product = rest + weighted[index] * new
            new_square = rest_square + weight * new * new
            better = (
                (rest > 0)
                & (new != old)
                & (new_square > 0)
                & (new_product * new_product * square > product * product * new_square)
            )
            codes[index] = torch.where(better, new, old)
            product = torch.where(better, new_product, product)
            square = torch.where(better, new_square, square)
            changed |= better
        if not bool(changed.any()):
            break
    scale = torch.where(square > 0, product / square, torch.zeros_like(square))
    return Fit(scale.masked_fill(zero, 0.0), (codes + half).masked_fill(zero, 0.0))


def fit_range(
    values: Tensor,
    top: int,
    weights: Tensor,
    *,
    first: float,
    step: float,
    steps: int,
    absolute: bool = False,
) -> RangeFit:
    """Codes ``0 ... top`` above a minimum that is zero or less.

    Scales from ``top + first`` on by ``step`` levels to the range; of each, the least-squares
    scale and minimum of the codes it leads to. Squared errors decide, or with ``absolute``
    absolute ones. A better minimum is the one that the next steps start from.
    """
    total, moment = in_order(weights), in_order(weights * values)
    low = lowest(values)
    low = low.masked_fill(low > 0, 0.0)
    high = values.amax(dim=0)
    flat = high <= low

    def codes_of(inverse: Tensor, low: Tensor) -> Tensor:
        return nearest(inverse * (values - low)).clamp_(0, top)

    def error(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        away = scale * codes + low - values
        return in_order(weights * (away.abs() if absolute else away * away))

    inverse = divide(float(top), high - low)
    scale = divide(1.0, inverse)
    best = error(codes_of(inverse, low), scale, low)
    found, start = inverse, low
    for index in range(steps + 1):
        inverse = divide(f32(f32(f32(first) + f32(f32(step) * index)) + top), high - low)
        codes = codes_of(inverse, low)
        weighted = weights * codes
        linear, square = in_order(weighted), in_order(weighted * codes)
        product = in_order(weighted * values)
        determinant = total * square - linear * linear
        new_scale = (total * product - moment * linear) / determinant
        new_low = (square * moment - linear * product) / determinant
        above = new_low > 0
        new_low = new_low.masked_fill(above, 0.0)
        new_scale = torch.where(above, product / square, new_scale)
        new = error(codes, new_scale, new_low)
        better = (determinant > 0) & (new < best)
        found, start = torch.where(better, inverse, found), torch.where(better, low, start)
        best = torch.where(better, new, best)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
    codes = codes_of(found, start).masked_fill(flat, 0.0)
    return RangeFit(scale.masked_fill(flat, 0.0), -low, codes)


def fit_positive(values: Tensor, top: int, weights: Tensor) -> Fit:
    """Codes ``0 ... top`` of values that are not negative: scales of scales."""
    most = values.amax(dim=0).clamp(min=0.0)
    zero = most < TINY
    inverse = divide(float(top), most)
    away = values - divide(1.0, inverse) * nearest(inverse * values)
    best = in_order(weights * away * away)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        other = divide(f32(f32(f32(0.1) * step) + top), most)
        away = values - divide(1.0, other) * nearest(other * values).clamp(max=top)
        error = in_order(weights * away * away)
        better = error < best
        best = torch.where(better, error, best)
        inverse = torch.where(better, other, inverse)
    codes = nearest(inverse * values).clamp(max=top)
    weighted = weights * values
    product, square = in_order(weighted * codes), in_order(weights * codes * codes)
    for _ in range(5):
        changed = torch.zeros_like(zero)
        for index in range(values.shape[0]):
            value, weight, old = values[index], weights[index], codes[index]
            rest = product - weighted[index] * old
            rest_square = square - weight * old * old
            new = nearest(value * rest_square / rest).clamp(max=top)
            new_product = rest + weighted[index] * new
            new_square = rest_square + weight * new * new
            better = (
                (rest > 0)
                & (rest_square > 0)
                & (new != old)
                & (new_product * new_product * square > product * product * new_square)
            )
            codes[index] = torch.where(better, new, old)
            product = torch.where(better, new_product, product)
            square = torch.where(better, new_square, square)
            changed |= better
        if not bool(changed.any()):
            break
    scale = torch.where(square > 0, product / square, torch.zeros_like(square))
    return Fit(scale.masked_fill(zero, 0.0), codes.masked_fill(zero, 0.0))
