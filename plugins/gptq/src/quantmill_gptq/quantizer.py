"""What a GPTQ target will be, and plain rounding for targets that no data reaches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantmill.backend import Quantizer, WeightSource
from quantmill.findings import Finding, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Form
from quantmill.targeting.types import Target
from quantmill_gptq.codec import abstract_form
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.rounding import Grid, grid_of, rounded

__all__ = ["GptqQuantizer", "group_count", "group_width"]

NO_WORDS = declare("QM-GPTQ-002", "A module's shape does not fill the layout's 32-bit words")


def group_width(config: GptqConfig, columns: int) -> int:
    """Input columns per group."""
    return columns if config.group_size == -1 else min(config.group_size, columns)


def group_count(config: GptqConfig, columns: int) -> int:
    """Groups of a row; the last may be ragged."""
    return -(-columns // group_width(config, columns))


class GptqQuantizer(Quantizer[GptqConfig]):
    """Planning, and rounding to nearest without calibration."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        config = self.config
        columns = target.in_features
        return abstract_form(
            target,
            config.bits,
            group_width(config, columns),
            group_count(config, columns),
            config.desc_act,
            torch.float16,
            dtype,
        )

    def check(self, target: Target) -> Iterator[Finding]:
        period = 32 if self.config.bits == 3 else 32 // self.config.bits
        for features, words in ((target.in_features, "width"), (target.out_features, "height")):
            if features % period:
                yield NO_WORDS(
                    target.name,
                    f"its {words} {features} is no multiple of {period}, which the layout of"
                    f" {self.config.bits} bits needs",
                    f"keep it float: --skip {target.name}",
                )

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        whole = weight.tensor().to(torch.float32)
        with FiniteCheck(weight.name) as finite:
            finite.look(whole)
        width = group_width(self.config, target.in_features)
        grid: Grid = grid_of(whole, width, self.config)
        return rounded(whole, grid, width, self.config, weight.dtype)
