"""The half-quadratic optimiser: float zero points that minimise an l_p error, p below 1.

For groups of weights ``w`` with a fixed scale ``s``, codes ``q`` and a zero point ``z``, minimise
``sum |w - s * (q - z)| ** p``. Half-quadratic splitting puts a variable ``e`` for the error, which
takes outliers out of the fit, and alternates

- ``q = round(w / s + z)``, clamped to the codes there are;
- ``e = shrink(residual)``, the generalised soft threshold of the l_p norm;
- ``z = mean(q - (w / s - e))``, in closed form.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
One thing differs: each group keeps its best zero point, as it is stored, and leaves the iteration
when it no longer improves; published, all groups get the last one. So a group's result never
depends on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["errors", "search_bytes", "solve"]

_BETA = 10.0
_KAPPA = 1.01
"""Weight of the quadratic term and its growth per iteration, as published."""
_LEAST = 1e-9
"""Residuals below it count as it: ``x ** (p - 1)`` has a pole at 0."""
_PATIENCE = {1: 20, 2: 8, 3: 8}
"""Iterations without a better zero point after which a group is done, by bits; else 3. The fewer
bits, the more often a group gets worse on the way to its best."""
_CHUNK = 1 << 17
"""Weights worked on at a time: what is computed with stays in the processor's cache."""


def search_bytes(weights: int, iters: int) -> int:
    """Memory that :func:`solve` takes for so many weights beside its arguments and results."""
    return (36 if iters else 20) * min(weights, _CHUNK)


def solve(
    values: Tensor, bits: int, dtype: torch.dtype, *, iters: int = 20, norm: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups.

    Args:
        values: finite float32 ``[groups, size]``.
        bits: per code.
        dtype: in which scales and zero points are stored; codes are chosen for what is stored.
        iters: most iterations; 0 for rounding to nearest over the group's range.
        norm: p, more than 0 and at most 1.

    Returns:
        Codes uint8 ``[groups, size]``, scales and zero points ``dtype`` ``[groups]``.
    """
    groups, size = values.shape
    codes = torch.empty(groups, size, dtype=torch.uint8, device=values.device)
    scales = torch.empty(groups, dtype=dtype, device=values.device)
    zeros = torch.empty(groups, dtype=dtype, device=values.device)
    step = max(1, _CHUNK // size)
    for start in range(0, groups, step):
        part = values[start : start + step]
        scale = _scales(part, bits, dtype)
        scaled = part / scale.to(torch.float32).unsqueeze(1)
        zero = _zeros(scaled, scale, bits, dtype, iters, norm)
        top = float(2**bits - 1)
        chosen = torch.round(scaled + zero.to(torch.float32).unsqueeze(1)).clamp_(0, top)
        codes[start : start + step] = chosen.to(torch.uint8)
        scales[start : start + step] = scale
        zeros[start : start + step] = zero
    return codes, scales, zeros


def errors(scaled: Tensor, zero: Tensor, bits: int, norm: float) -> Tensor:
    """``sum |residual| ** norm`` of each group, in units of its scale; float32 ``[groups]``.

    ``scaled`` is ``w / s`` ``[groups, size]``, ``zero`` ``[groups]``, both float32.
    """
    moved = scaled + zero.unsqueeze(1)
    residual = moved - torch.round(moved).clamp_(0, float(2**bits - 1))
    return _sum(residual.abs_().log2_().mul_(norm).exp2_())


def _scales(values: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The range of each group over the steps there are; 1 for a constant group."""
    low, high = values.amin(dim=1), values.amax(dim=1)
    top = float(2**bits - 1)
    limits = torch.finfo(dtype)
    # Divided first: the range of float32 numbers can exceed float32.
    scale = (high / top - low / top).clamp(max=limits.max)
    if dtype == torch.float16:
        # The zero point, of up to |w| / s, has to be finite too.
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) / 32768)
    scale = scale.to(dtype)
    return torch.where((scale > 0) & (high > low), scale, torch.ones_like(scale))


def _zeros(
    scaled: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, iters: int, norm: float
) -> Tensor:
    """The best zero point of each group, ``dtype`` ``[groups]``."""
    low = scaled.amin(dim=1)
    best = (-low).to(dtype).to(torch.float32)
    if iters == 0:
        return best.to(dtype)
    least = errors(scaled, best, bits, norm)
    # Published: 4 bits start from a rounded zero point.
    start = torch.round(-low).to(dtype).to(torch.float32) if bits == 4 else best
    zero, error = _iterate(scaled, start, scale.to(torch.float32), bits, dtype, iters, norm)
    return torch.where(error < least, zero, best).to(dtype)


def _iterate(
    scaled: Tensor,
    zero: Tensor,
    unit: Tensor,
    bits: int,
    dtype: torch.dtype,
    iters: int,
    norm: float,
) -> tuple[Tensor, Tensor]:
    """The best zero points on the way from ``zero``, and their errors; float32 ``[groups]``.

    ``unit`` is what a residual is multiplied with before it is shrunk: the scale.
    """
    top = float(2**bits - 1)
    best, least = zero.clone(), torch.full_like(zero, float("inf"))
    active = torch.arange(zero.numel(), device=zero.device)
    most = _PATIENCE.get(bits, 3)
    patience = torch.full_like(active, most)
    beta = _BETA
    for _ in range(iters + 1):
        moved = scaled + zero.unsqueeze(1)
        codes = torch.round(moved).clamp_(0, top)
        residual = moved.sub_(codes)
        size = residual.abs().clamp_(min=_LEAST)
        # A power by its logarithm: four times faster than pow, and as good for a threshold.
        power = size.log2().mul_(norm - 1).exp2_()
        error = _sum(size * power)
        better = error < least[active]
        won = active[better]
        least[won], best[won] = error[better], zero[better]
        patience = torch.where(better, most, patience - 1)
        # |x| - |x| ** (p - 1) / beta in other units: the power of the unit comes out.
        power.mul_(unit.pow(norm - 2).unsqueeze(1))
        kept = size.sub_(power.div_(beta)).clamp_(min=0).copysign_(residual)
        mean = _sum(codes.sub_(scaled).add_(kept)) / scaled.shape[1]
        moving = (patience > 0) & torch.isfinite(mean)
        if not bool(moving.any()):
            break
        zero = mean.to(dtype).to(torch.float32)
        if not bool(moving.all()):
            active, patience, zero = active[moving], patience[moving], zero[moving]
            scaled, unit = scaled[moving], unit[moving]
        beta *= _KAPPA
    return best, least


def _sum(values: Tensor) -> Tensor:
    """Sums of the rows of ``[groups, size]``, changing it. By halves, so that the order of the
    additions, and with it the last bit, is the same however many rows there are."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        odd = values[:, -1:].clone() if values.shape[1] % 2 else None
        values = values[:, :half] + values[:, half : 2 * half]
        if odd is not None:
            values[:, :1] += odd
    return values[:, 0]
