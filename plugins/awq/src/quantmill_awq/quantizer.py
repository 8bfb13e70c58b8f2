"""What an AWQ target will be, and plain rounding without data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantmill.backend import Quantizer, WeightSource
from quantmill.findings import Finding, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Form
from quantmill.targeting.types import Target
from quantmill_awq.codec import abstract_form
from quantmill_awq.config import AwqConfig
from quantmill_awq.rounding import group_width, make_form

__all__ = ["AwqQuantizer"]

NO_WORDS = declare("QM-AWQ-002", "A module's shape does not fill the layout's 32-bit words")
NO_GROUPS = declare("QM-AWQ-003", "A module's width is no multiple of the group size")


class AwqQuantizer(Quantizer[AwqConfig]):
    """Planning, and rounding to nearest without calibration."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        width = group_width(self.config, target.in_features)
        groups = -(-target.in_features // width)
        return abstract_form(target, width, groups, torch.float16, dtype)

    def check(self, target: Target) -> Iterator[Finding]:
        for features, words in ((target.in_features, "width"), (target.out_features, "height")):
            if features % 8:
                yield NO_WORDS(
                    target.name,
                    f"its {words} {features} is no multiple of 8",
                    f"keep it float: --skip {target.name}",
                )
        width = group_width(self.config, target.in_features)
        if target.in_features % width:
            yield NO_GROUPS(
                target.name,
                f"its width {target.in_features} is no multiple of {width}, and AWQ's kernels"
                " read whole groups",
                f"choose a group size that divides it, or keep it float: --skip {target.name}",
            )

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        whole = weight.tensor().to(torch.float32)
        with FiniteCheck(weight.name) as finite:
            finite.look(whole)
        return make_form(whole, self.config, weight.dtype)
