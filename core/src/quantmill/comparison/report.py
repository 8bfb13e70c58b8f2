"""What a comparison found: totals, JSON, and what the page is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantmill.comparison.weights import ModuleComparison
from quantmill.conversion.measure import Distance
from quantmill.findings import Findings, Severity, declare

__all__ = ["RESCALED", "UNRELATED", "Comparison", "Judgement"]

UNRELATED = declare("QM-COMPARE-002", "The weights of the two checkpoints have nothing in common")
RESCALED = declare(
    "QM-COMPARE-003", "Scales were moved between the weights of one checkpoint", Severity.INFO
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the two compute on a text. Divergences are in nats per token."""

    text: str
    tokens: int
    windows: int
    context: int
    perplexity: tuple[float, float]
    kl: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "windows": self.windows,
            "context": self.context,
            "perplexity": list(self.perplexity),
            "kl": self.kl,
            "kl_interval": None if self.kl_interval is None else list(self.kl_interval),
            "top1_agreement": self.top1_agreement,
        }


@dataclass(slots=True)
class Comparison:
    """Two checkpoints of one model."""

    names: tuple[str, str]
    methods: tuple[str, str]
    modules: list[ModuleComparison]
    bytes: tuple[int, int]
    """Of all tensors on disk."""
    judgement: Judgement | None = None
    findings: Findings = field(default_factory=Findings)
    rescaled: bool = False
    """Norms or biases differ: one of the two moved scales into them."""
    seconds: float = 0.0

    @property
    def total(self) -> Distance:
        """All matrices together."""
        found = Distance()
        for item in self.modules:
            if item.is_matrix:
                found.join(item.distance)
        return found

    def error(self, item: ModuleComparison) -> float:
        """The relative error to show for a weight: with columns scaled where scales moved."""
        return item.aligned.relative if self.rescaled else item.distance.relative

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "names": list(self.names),
            "methods": list(self.methods),
            "bytes": list(self.bytes),
            "rescaled": self.rescaled,
            "total": self.total.to_dict(),
            "judgement": None if self.judgement is None else self.judgement.to_dict(),
            "modules": [item.to_dict() for item in self.modules if item.is_matrix],
            "findings": self.findings.to_list(),
            "seconds": self.seconds,
        }
