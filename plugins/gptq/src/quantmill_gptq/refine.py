"""Coordinate descent on a rounded weight: better codes and scales for the same error.

GPTQ chooses each code once, with later columns still free. Once all are chosen, any one of them,
and any group's scale, can be chosen again for the others as they are, which can only lower the
error (the codes' passes: QuantEase, arXiv 2309.01885). Per pass it costs what the first one does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill_gptq.config import GptqConfig
from quantmill_gptq.rounding import Grid, stored

__all__ = ["refined"]

_PANEL = 128


def refined(
    work: Tensor,
    codes: Tensor,
    grid: Grid,
    hessian: Tensor,
    damping: float,
    owner: Tensor,
    config: GptqConfig,
) -> tuple[Tensor, Grid]:
    """Codes uint8 ``[out, in]`` and grid after ``config.refinements`` passes.

    Args:
        work: float32 ``[out, in]``, the weight, its columns in the order of ``hessian``.
        codes: uint8 ``[out, in]``, what it was rounded to on ``grid``.
        hessian: float32 ``[in, in]``, mean of ``x x.T``.
        damping: share of its mean diagonal that is added to the diagonal.
        owner: group of each column.
    """
    diagonal = hessian.diagonal() + damping * hessian.diagonal().mean()
    extra = damping * hessian.diagonal().mean()
    # Columns are rows here, as in the first pass.
    scales, zeros = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    steps = codes.t().to(torch.float32) - zeros[owner]
    missing = work.t() - steps * scales[owner]
    slope = hessian @ missing
    slope.add_(missing, alpha=float(extra))
    del missing
    for _ in range(config.refinements):
        _codes(steps, scales, zeros, slope, hessian, diagonal, float(extra), owner, config)
        if not config.static_groups:
            _scales(steps, scales, slope, hessian, float(extra), owner)
    found = (steps + zeros[owner]).to(torch.uint8)
    return found.t().contiguous(), Grid(scales.t().contiguous(), grid.zero)


def _codes(
    steps: Tensor,
    scales: Tensor,
    zeros: Tensor,
    slope: Tensor,
    hessian: Tensor,
    diagonal: Tensor,
    extra: float,
    owner: Tensor,
    config: GptqConfig,
) -> None:
    """One pass over the columns; ``slope`` is ``H (w - w')``, kept up to date."""
    owners: list[int] = owner.tolist()
    columns = steps.shape[0]
    shares = diagonal.tolist()
    top = float(config.maximum)
    for start in range(0, columns, _PANEL):
        stop = min(columns, start + _PANEL)
        panel = slope[start:stop].clone()
        moves = torch.empty_like(panel)
        local = hessian[start:stop, start:stop]
        for step in range(stop - start):
            column = start + step
            scale, zero = scales[owners[column]], zeros[owners[column]]
            before = steps[column].clone()
            wanted = (panel[step] / shares[column]).div_(scale).add_(before).add_(zero)
            steps[column] = wanted.round_().clamp_(0, top).sub_(zero)
            moves[step] = (steps[column] - before).mul_(scale)
            if step + 1 < stop - start:
                panel[step + 1 :].addr_(local[step, step + 1 :], moves[step], alpha=-1.0)
        slope.addmm_(hessian[:, start:stop], moves, alpha=-1.0)
        slope[start:stop].sub_(moves, alpha=extra)


def _scales(
    steps: Tensor, scales: Tensor, slope: Tensor, hessian: Tensor, extra: float, owner: Tensor
) -> None:
    """One pass over the groups."""
    for group in range(scales.shape[0]):
        members = (owner == group).nonzero().flatten()
        inside = steps[members]
        spread = hessian[:, members] @ inside
        spread[members] += extra * inside
        energy = (spread[members] * inside).sum(0)
        move = (slope[members] * inside).sum(0) / energy.clamp(min=1e-30)
        wanted = stored(scales[group] + move)
        # A group of zeros has no scale to learn, and a scale stays positive.
        good = (energy > 0) & (scales[group] + move > 0.5 * scales[group])
        wanted = torch.where(good, wanted, scales[group])
        slope.addcmul_(spread, wanted - scales[group], value=-1.0)
        scales[group] = wanted
