"""One choice for every target within a budget of bytes, with the least total cost.

This is the multiple-choice knapsack problem. It is solved by dynamic programming over bytes,
exactly where the budget has at most ``STEPS`` units (the greatest common divisor of all sizes), and
otherwise with sizes rounded up to units: never over the budget, and what rounding leaves is then
spent where it helps most.

Source: H. Kellerer, U. Pferschy, D. Pisinger, *Knapsack Problems*, Springer 2004, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

__all__ = ["STEPS", "allocate", "least_bytes"]

STEPS: Final = 50_000
"""Most units of a budget; a table of as many bytes is kept for each target."""


def least_bytes(sizes: Sequence[Sequence[int]]) -> int:
    """Bytes of the smallest choice of every target."""
    return sum(min(row) for row in sizes)


def allocate(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """The index of the choice for each target.

    Args:
        sizes: bytes of each choice of each target.
        costs: what each choice costs, at least zero; costs of targets add up.
        budget: most bytes of all.

    Raises:
        ValueError: even the smallest choices are over the budget.
    """
    least = least_bytes(sizes)
    if least > budget:
        raise ValueError(f"the smallest choices take {least} bytes, the budget is {budget}")
    # Only what comes on top of the smallest choice is to be decided.
    extra = [[size - min(row) for size in row] for row in sizes]
    room = budget - least
    unit = math.gcd(*(size for row in extra for size in row)) or 1
    unit = max(unit, -(-room // STEPS), 1)
    chosen = _table(extra, costs, room // unit, unit)
    return _spend(extra, costs, room, chosen)


def _table(
    extra: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], units: int, unit: int
) -> list[int]:
    """Choices of least cost with sizes rounded up to units."""
    # best[u]: least cost of the targets so far in at most u units.
    best = torch.zeros(units + 1, dtype=torch.float64)
    taken: list[torch.Tensor] = []
    for row, prices in zip(extra, costs, strict=True):
        following = torch.full_like(best, math.inf)
        which = torch.zeros(units + 1, dtype=torch.uint8)
        for index, (size, price) in enumerate(zip(row, prices, strict=True)):
            need = -(-size // unit)
            if need > units:
                continue
            candidate = best[: units + 1 - need] + price
            better = candidate < following[need:]
            following[need:][better] = candidate[better]
            which[need:][better] = index
        best = following
        taken.append(which)
    at, chosen = units, []
    for row, which in zip(reversed(extra), reversed(taken), strict=True):
        index = int(which[at])
        chosen.append(index)
        at -= -(-row[index] // unit)
    return chosen[::-1]


def _spend(
    extra: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    room: int,
    chosen: list[int],
) -> list[int]:
    """Change single choices for better ones while what is left allows it."""
    left = room - sum(row[index] for row, index in zip(extra, chosen, strict=True))
    while True:
        best = (0.0, -1, -1)
        for target, index in enumerate(chosen):
            for other, size in enumerate(extra[target]):
                gain = costs[target][index] - costs[target][other]
                if size - extra[target][index] <= left and gain > best[0]:
                    best = (gain, target, other)
        gain, target, other = best
        if target < 0:
            return chosen
        left -= extra[target][other] - extra[target][chosen[target]]
        chosen[target] = other
