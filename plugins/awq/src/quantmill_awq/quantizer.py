"""What an AWQ target will be, and plain rounding without data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantmill.backend import Quantizer, WeightSource
from quantmill.config import group_width
from quantmill.findings import Finding, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Affine, Form
from quantmill.forms.rows import join_rows, whole_bytes
from quantmill.targeting.types import Target
from quantmill_awq.codec import abstract_form
from quantmill_awq.config import AwqConfig
from quantmill_awq.rounding import make_form

__all__ = ["AwqQuantizer"]

NO_WORDS = declare("QM-AWQ-002", "A module's shape does not fill the layout's 32-bit words")
NO_GROUPS = declare("QM-AWQ-003", "A module's width is no multiple of the group size")


class AwqQuantizer(Quantizer[AwqConfig]):
    """Planning, and rounding to nearest without calibration."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        width = group_width(self.config.group_size, target.in_features)
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
        width = group_width(self.config.group_size, target.in_features)
        if target.in_features % width:
            yield NO_GROUPS(
                target.name,
                f"its width {target.in_features} is no multiple of {width}, and AWQ's kernels"
                " read whole groups",
                f"choose a group size that divides it, or keep it float: --skip {target.name}",
            )

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        columns = target.in_features
        with FiniteCheck(weight.name) as finite:

            def parts() -> Iterator[tuple[int, Affine]]:
                for start, block in weight.row_blocks(whole_bytes(columns, self.config.bits)):
                    rows = block.to(torch.float32)
                    finite.look(rows, start * columns)
                    yield start, make_form(rows, self.config, weight.dtype)

            return join_rows(parts(), target.out_features)
