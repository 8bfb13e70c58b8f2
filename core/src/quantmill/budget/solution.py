"""The allocation by estimated costs, mended by what is measured around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from quantmill.budget.allocate import allocate
from quantmill.budget.choices import Choices
from quantmill.budget.lanes import Lane
from quantmill.budget.sensitivity import Sensitivity

__all__ = ["WINDOWS", "solve"]

WINDOWS: Final = 8
"""Batches of the search on which mixtures are measured."""
_TRUST: Final = 0.5
"""Exponent of what is measured around a solution by what was estimated: half of each, as what a
few windows say of one target is no more certain than the estimate."""
_MOST: Final = 4.0
"""A target's costs are corrected by at most this."""


def solve(
    choices: Choices,
    found: Sensitivity,
    costs: Sequence[Sequence[float]],
    allowed: int,
    remeasure: int,
) -> tuple[list[int], float]:
    """The choice for each target, and the KL divergence per token that is measured of them.

    The allocation by ``costs`` is solved; then each of its ``remeasure`` costliest targets is made
    float again, which says what it costs beside the errors of all others, and the allocation is
    solved once more with costs between the two. The better one is taken.
    """
    names = [target.name for target in choices.targets]

    def lane(chosen: Sequence[int]) -> Lane:
        return Lane({n: choices.labels[i] for n, i in zip(names, chosen, strict=True)})

    chosen = allocate(choices.sizes, costs, allowed)
    own = [row[index] for row, index in zip(costs, chosen, strict=True)]
    picked = sorted(range(len(names)), key=lambda n: -own[n])[:remeasure]
    mixture = lane(chosen)
    without = [
        Lane({k: v for k, v in mixture.choices.items() if k != names[n]}, mixture) for n in picked
    ]
    if not without:
        found.measure([mixture], WINDOWS)
        return chosen, mixture.divergence
    found.measure(without, WINDOWS, mixture)
    corrected = [list(row) for row in costs]
    for number, item in zip(picked, without, strict=True):
        if own[number] > 0:
            share = (mixture.divergence - item.divergence) / own[number]
            share = min(max(share, 1 / _MOST), _MOST) ** _TRUST
            corrected[number] = [share * cost for cost in costs[number]]
    other = allocate(choices.sizes, corrected, allowed)
    if other == chosen:
        return chosen, mixture.divergence
    again = lane(other)
    found.measure([again], WINDOWS)
    if again.divergence < mixture.divergence:
        return other, again.divergence
    return chosen, mixture.divergence
