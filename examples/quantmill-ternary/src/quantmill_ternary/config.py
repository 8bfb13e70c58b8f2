"""What the method can be told: the fields of ``quantization_config``, typed and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field
from quantmill.config import MethodConfig
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule

__all__ = ["TernaryConfig", "skip_rules"]


class TernaryConfig(MethodConfig):
    """Ternary weights, 1.6 bits each, with one scale for each group of a row."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    group_size: int = Field(64, ge=8, le=65536)
    """Consecutive weights of a row that share a scale; the last group of a row may be shorter."""
    threshold: float = Field(0.7, gt=0, lt=4)
    """Weights smaller than this many times their group's mean magnitude become zero. 0.7 is next to
    the best for normal weights (Li et al., Ternary Weight Networks, arXiv 1605.04711)."""
    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""

    def to_checkpoint(self) -> dict[str, Any]:
        return {**super().to_checkpoint(), "quant_method": "ternary"}

    def keeping(self, modules: Sequence[str]) -> TernaryConfig:
        names = sorted({*(self.modules_to_not_convert or []), *modules})
        return self.model_copy(update={"modules_to_not_convert": names or None})


def skip_rules(config: TernaryConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules; quantmill's defaults stay in force beside it."""
    return from_transformers_skip(config.modules_to_not_convert or [], origin)
