"""The choices for every target: what each method would make of it, in exact bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from quantmill.budget.allocate import allocate, least_bytes
from quantmill.findings import QuantmillError, declare
from quantmill.targeting.types import Target

if TYPE_CHECKING:
    from quantmill.planning import Plan

__all__ = ["Budget", "Choices", "joined_method"]

Number = TypeVar("Number", int, float)

BAD_BUDGET = declare("QM-BUDGET-001", "A budget can't be read")
IMPOSSIBLE = declare("QM-BUDGET-002", "The budget is less than the least possible")
TOO_FEW = declare("QM-BUDGET-003", "A budget needs several methods to choose from")
NOTHING = declare("QM-BUDGET-004", "The methods have no target in common to choose for")
_BITS = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) *(?:bpw|bits?)?")


@dataclass(frozen=True, slots=True)
class Budget:
    """Bits per weight of the targets, scales and all, on the disk."""

    bits: float

    @classmethod
    def of(cls, value: Budget | float | str) -> Budget:
        """From a number of bits, or ``4.25bpw``.

        Raises:
            QuantmillError: it is no positive number.
        """
        if isinstance(value, Budget):
            return value
        match = _BITS.fullmatch(str(value).strip().lower())
        if match is None or not 0 < float(match[1]) <= 64:
            raise QuantmillError(
                BAD_BUDGET("budget", f"{value!r} is no number of bits per weight", "write 4.25bpw")
            )
        return cls(float(match[1]))


@dataclass(slots=True)
class Choices:
    """Targets, labels, and the bytes of each pair."""

    labels: list[str]
    targets: list[Target] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    """Bytes by target and label."""
    units: list[list[int]] = field(default_factory=list)
    """Numbers of the targets that have one choice together."""

    @classmethod
    def of(cls, plans: Mapping[str, Plan], shared: Callable[[Target], str | None]) -> Choices:
        """From the plan of each method alone; targets are what all of them quantize.

        Those that have a name in ``shared`` in common are a unit.

        Raises:
            QuantmillError: fewer than two methods, or no target in common.
        """
        if len(plans) < 2:
            raise QuantmillError(
                TOO_FEW(
                    "methods",
                    f"{', '.join(plans) or 'none'} leaves nothing to choose",
                    "name several, separated by commas",
                )
            )
        by_label: dict[str, dict[str, Any]] = {
            label: {
                entry.target.name: entry
                for entry in plan.modules
                if entry.action == "quantize" and entry.target is not None
            }
            for label, plan in plans.items()
        }
        first = next(iter(by_label.values()))
        common = [name for name in first if all(name in rows for rows in by_label.values())]
        if not common:
            raise QuantmillError(
                NOTHING("methods", "no module is a target of all of them", "take other methods")
            )
        targets = [first[name].target for name in common]
        units: dict[str, list[int]] = {}
        for number, target in enumerate(targets):
            units.setdefault(shared(target) or target.name, []).append(number)
        return cls(
            labels=list(plans),
            targets=targets,
            sizes=[[rows[name].bytes_after for rows in by_label.values()] for name in common],
            units=list(units.values()),
        )

    @property
    def weights(self) -> int:
        """Of all targets."""
        return sum(target.weights for target in self.targets)

    def bits(self, size: float) -> float:
        """Bits per weight that bytes of all targets are."""
        return 8 * size / self.weights

    def bytes_within(self, budget: Budget) -> int:
        """Bytes that a budget allows.

        Raises:
            QuantmillError: it is less than the smallest choices take.
        """
        allowed = int(budget.bits * self.weights / 8)
        least = least_bytes(_sums(self.sizes, self.units))
        if allowed < least:
            raise QuantmillError(
                IMPOSSIBLE(
                    f"{budget.bits:g}bpw",
                    f"with {', '.join(self.labels)} the least is {self.bits(least):.4f} bits per"
                    f" weight, {least:,} bytes",
                    "raise the budget, or add a method of fewer bits",
                    least_bits=self.bits(least),
                    least_bytes=least,
                )
            )
        return allowed

    def allocate(self, costs: Sequence[Sequence[float]], allowed: int) -> list[int]:
        """The choice for each target: of least ``costs``, by target and label, in so many bytes."""
        by_unit = allocate(_sums(self.sizes, self.units), _sums(costs, self.units), allowed)
        chosen = [0] * len(self.targets)
        for unit, index in zip(self.units, by_unit, strict=True):
            for number in unit:
                chosen[number] = index
        return chosen

    def uniform(self, label: str) -> int:
        """Bytes of all targets with one method."""
        index = self.labels.index(label)
        return sum(row[index] for row in self.sizes)


def _sums(rows: Sequence[Sequence[Number]], units: Sequence[Sequence[int]]) -> list[list[Number]]:
    """By unit what is by target, and by label."""
    return [
        [sum(column) for column in zip(*(rows[n] for n in unit), strict=True)] for unit in units
    ]


def joined_method(
    choices: Choices, chosen: Sequence[int], methods: Sequence[str]
) -> dict[str, Any]:
    """METHOD that gives each target its choice: the most frequent one is the main method.
    ``methods`` stand for the choices' labels."""
    counts = [chosen.count(index) for index in range(len(choices.labels))]
    main = counts.index(max(counts))
    return {
        "method": methods[main],
        "assign": {
            target.name: methods[index]
            for target, index in zip(choices.targets, chosen, strict=True)
            if index != main
        },
    }
