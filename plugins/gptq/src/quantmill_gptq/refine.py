"""Coordinate descent on a rounded weight: better codes and scales for the same error.

GPTQ chooses each code once, with later columns still free. Once all are chosen, any one of them,
and any group's scale, can be chosen again for the others as they are, which can only lower the
error (the codes' passes: QuantEase, arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quantmill.kernels import KernelRegistry
from quantmill_gptq.columns import SEVERAL, Panel, descend, preferred, rescaled

__all__ = ["refine", "slope_of"]


@cache
def _precision(device: str) -> torch.dtype:
    """In which slopes are multiplied. They only say which way a code is to move, and how far, in
    whole steps: bfloat16 is enough, where the processor multiplies it several times as fast."""
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return torch.float32
    found = torch.cpu.get_capabilities()
    fast = found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def slope_of(errors: Tensor, root: Tensor) -> Tensor:
    """Damped moments times what a weight lacks after it was rounded, ``[in, out]``.

    What it lacks is ``U.T @ errors``, and the moments are ``V @ V.T`` with V the inverse of U: a
    triangle's product instead of a square's.

    Args:
        errors: float32 ``[in, out]``, of each column, over its diagonal entry.
        root: V, float32 ``[in, in]``.
    """
    slope, dtype = torch.empty_like(errors), _precision(errors.device.type)
    errors = errors.to(dtype)
    for start in range(0, root.shape[0], SEVERAL):
        stop = start + SEVERAL
        slope[start:stop] = root[start:stop, start:].to(dtype) @ errors[start:]
    return slope


def refine(
    steps: Tensor,
    scales: Tensor,
    zeros: Tensor,
    slope: Tensor,
    hessian: Tensor,
    damping: float,
    panels: Sequence[Panel],
    top: int,
    kernels: KernelRegistry,
) -> None:
    """One pass over all columns, each group's scale after its codes; in place.

    Args:
        steps: float32 ``[in, out]``, codes minus zero points, in the order of ``hessian``.
        scales: float32 ``[groups, out]``.
        zeros: the same.
        slope: damped moments times what the weight lacks, ``[in, out]``; used up.
        hessian: float32 ``[in, in]``, mean of ``x x.T``.
        damping: share of its mean diagonal that is added to the diagonal.
        panels: of columns; where they have no ends, scales stay.
        top: the largest code.
        kernels: may have a faster ``descend``.
    """
    extra = float(damping * hessian.diagonal().mean())
    pass_over = preferred("descend", descend, kernels, steps.device)
    dtype = _precision(steps.device.type)
    moved = torch.empty_like(slope, dtype=dtype)
    # Up to here slopes know all moves so far; columns beyond get them for several panels at once.
    # A group of several panels goes on with all that come after it, so nothing waits then.
    near, several = 0, SEVERAL
    if any(panel.wide is not None for panel in panels):
        several = slope.shape[0]
    for panel in panels:
        start, stop = panel.start, panel.stop
        if stop > near:
            far = slice(near, max(stop, start + several))
            if start:
                slope[far].sub_(hessian[far, :start].to(dtype) @ moved[:start])
            near = far.stop
        local = hessian[start:stop, start:stop].clone()
        local.diagonal().add_(extra)
        moves = slope[start:stop].clone()
        pass_over(moves, local, panel.groups, panel.ends, scales, zeros, steps[start:stop], top=top)
        moved[start:stop] = moves
        # Columns before are done with, but for those whose scale is still to be chosen.
        after = stop if panel.wide is None else panel.wide[0]
        slope[after:near].sub_(hessian[after:near, start:stop].to(dtype) @ moved[start:stop])
        if panel.wide is not None:
            slope[start:stop].sub_(moves, alpha=extra)
            if stop == panel.wide[1]:
                own, inside = slope[after:stop], steps[after:stop]
                spread = hessian[after:, after:stop] @ inside
                spread[: stop - after].add_(inside, alpha=extra)
                added = rescaled(scales[panel.groups[0]], own, inside, spread)
                slope[stop:].addcmul_(spread[stop - after :], added, value=-1.0)
