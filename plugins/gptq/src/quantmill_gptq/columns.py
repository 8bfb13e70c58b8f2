"""Columns of a weight rounded one after the other, in panels that one kernel call works through.

Here are the panels, and the operations in torch: what the registry's kernels of ``compensate``,
``descend`` and ``product`` are measured against, and what computes where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from quantmill.kernels import KernelRegistry
from quantmill_gptq.rounding import fit, stored

__all__ = [
    "SEVERAL",
    "Panel",
    "compensate",
    "descend",
    "panels_of",
    "preferred",
    "product",
    "rescaled",
]

_COLUMNS = 128
SEVERAL = 512
"""Columns that get the product with others at once: one of few rows takes longer than its share."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Columns ``[start, stop)``, in the order in which they are rounded."""

    start: int
    stop: int
    groups: tuple[int, ...]
    """Group of each."""
    begins: tuple[int, ...]
    """Where a group begins, how many columns it has, else 0."""
    ends: tuple[int, ...]
    """Where one ends, the same."""
    wide: tuple[int, int] | None = None
    """First column and the one after the last of a group that has more than one panel."""


def panels_of(owner: Sequence[int], scaled: bool) -> list[Panel]:
    """Cut columns, whose groups are ``owner``, into panels.

    ``scaled``: groups lie together, and get their scales on the way; no panel then has a part of
    one group and some of another.
    """
    if not scaled:
        parts = [tuple(owner[at : at + _COLUMNS]) for at in range(0, len(owner), _COLUMNS)]
        starts = [_COLUMNS * number for number in range(len(parts))]
        return [_unscaled(start, part) for start, part in zip(starts, parts, strict=True)]
    found: list[Panel] = []
    waiting: list[tuple[int, int]] = []
    start = 0

    def close() -> None:
        nonlocal start
        groups = [number for number, size in waiting for _ in range(size)]
        begins = [n for _, size in waiting for n in (size, *[0] * (size - 1))]
        ends = [n for _, size in waiting for n in (*[0] * (size - 1), size)]
        stop = start + len(groups)
        if waiting:
            found.append(Panel(start, stop, tuple(groups), tuple(begins), tuple(ends)))
        waiting.clear()
        start = stop

    for number, members in groupby(owner):
        size = sum(1 for _ in members)
        if size + sum(n for _, n in waiting) > _COLUMNS:
            close()
        if size <= _COLUMNS:
            waiting.append((number, size))
            continue
        wide = (start, start + size)
        while start < wide[1]:
            stop = min(start + _COLUMNS, wide[1])
            found.append(_unscaled(start, (number,) * (stop - start), wide))
            start = stop
    close()
    return found


def _unscaled(start: int, groups: tuple[int, ...], wide: tuple[int, int] | None = None) -> Panel:
    none = (0,) * len(groups)
    return Panel(start, start + len(groups), groups, none, none, wide)


def preferred(
    operation: str,
    reference: Callable[..., Any],
    kernels: KernelRegistry,
    device: torch.device,
    form: str = "affine",
) -> Callable[..., Any]:
    """The registry's kernel of an operation on columns, or ``reference``."""
    choice = kernels.choose(operation, form, {}, device=device.type, dtype="float32")
    return reference if choice is None else choice.load()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``."""
    return a.t() @ b


def compensate(
    panel: Tensor,
    local: Tensor,
    groups: Sequence[int],
    spans: Sequence[int],
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    *,
    top: int,
    symmetric: bool,
    exponent: float,
) -> None:
    """Signature and meaning are those in :mod:`quantmill.kernels`."""
    count = panel.shape[0]
    for step in range(count):
        number = groups[step]
        if spans[step]:
            values = panel[step : step + spans[step]].t()
            scales[number], zeros[number] = fit(values, top, symmetric, exponent)
        scale, zero = scales[number], zeros[number]
        column = panel[step]
        code = torch.round(column / scale).add_(zero).clamp_(0, top)
        codes[step] = code
        column.sub_((code - zero) * scale).div_(local[step, step])
        if step + 1 < count:
            panel[step + 1 :].addr_(local[step, step + 1 :], column, alpha=-1.0)


def descend(
    panel: Tensor,
    local: Tensor,
    groups: Sequence[int],
    spans: Sequence[int],
    scales: Tensor,
    zeros: Tensor,
    steps: Tensor,
    *,
    top: int,
) -> None:
    """Signature and meaning are those in :mod:`quantmill.kernels`."""
    count = panel.shape[0]
    slope, moves = panel.clone(), panel
    diagonal: list[float] = local.diagonal().tolist()
    first = list(range(1, count + 1))  # whose slope is needed later
    for end, span in enumerate(spans):
        first[end + 1 - span : end + 1] = [end + 1 - span] * span
    for step in range(count):
        scale, zero = scales[groups[step]], zeros[groups[step]]
        before = steps[step].clone()
        wanted = (slope[step] / diagonal[step]).div_(scale).add_(before).round_()
        steps[step] = torch.minimum(torch.maximum(wanted, -zero), top - zero)
        moves[step] = (steps[step] - before).mul_(scale)
        after = first[step]
        slope[after:].addr_(local[step, after:], moves[step], alpha=-1.0)
        if spans[step]:
            begin, end = step + 1 - spans[step], step + 1
            spread = local[begin:end, begin:].t() @ steps[begin:end]
            added = rescaled(scales[groups[step]], slope[begin:end], steps[begin:end], spread)
            moves[begin:end].addcmul_(steps[begin:end], added)
            slope[begin:].addcmul_(spread, added, value=-1.0)


def rescaled(scale: Tensor, slope: Tensor, steps: Tensor, spread: Tensor) -> Tensor:
    """Choose a group's ``scale [out]`` again for the codes it has, in place; what was added.

    Args:
        scale: float32 ``[out]``.
        slope: moments times what the rounded weight lacks, of the group's columns ``[n, out]``.
        steps: codes minus zero points ``[n, out]``.
        spread: moments times ``steps``, the group's columns first.
    """
    energy = (spread[: steps.shape[0]] * steps).sum(0)
    move = (slope * steps).sum(0) / energy.clamp(min=1e-30)
    # A group of zeros has no scale to learn, and a scale stays positive.
    good = (energy > 0) & (scale + move > 0.5 * scale)
    wanted = torch.where(good, stored(scale + move), scale)
    added = wanted - scale
    scale.copy_(wanted)
    return added
