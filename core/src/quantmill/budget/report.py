"""What a search under a budget found and wrote."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantmill.findings import Finding

if TYPE_CHECKING:
    from quantmill.stages.write import WriteReport

__all__ = ["BudgetReport"]


@dataclass(slots=True)
class BudgetReport:
    """What was chosen, what it is expected to cost, and what was written."""

    budget: float
    """Bits per weight that were allowed."""
    bits: float
    """Bits per weight of the targets that were chosen."""
    bytes: int
    """Of the targets."""
    chosen: dict[str, str]
    """Target to method."""
    estimated: float
    """KL divergence per token of the mixture, measured on the search's windows with the weights
    that each method gave alone."""
    uniform: dict[str, tuple[float, float]]
    """Each method alone: bits per weight and estimated KL divergence."""
    sensitivity: dict[str, dict[str, float]]
    """Estimated KL divergence by target and method."""
    measured: list[tuple[str, str, float, float]]
    """Target, method, estimated and measured KL divergence."""
    correlation: float | None
    """Of their logarithms."""
    seconds: dict[str, float]
    """Of each step."""
    method: dict[str, Any]
    """METHOD that makes it again."""
    written: WriteReport | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Targets by method."""
        return dict(Counter(self.chosen.values()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "budget": self.budget,
            "bits_per_weight": self.bits,
            "bytes": self.bytes,
            "counts": self.counts,
            "estimated_kl": self.estimated,
            "uniform": {
                label: {"bits_per_weight": bits, "estimated_kl": cost}
                for label, (bits, cost) in self.uniform.items()
            },
            "measured": [
                {"target": name, "method": label, "estimated_kl": a, "measured_kl": b}
                for name, label, a, b in self.measured
            ],
            "correlation": self.correlation,
            "seconds": self.seconds,
            "chosen": self.chosen,
            "sensitivity": self.sensitivity,
            "method": self.method,
            "written": None if self.written is None else self.written.to_dict(),
        }
