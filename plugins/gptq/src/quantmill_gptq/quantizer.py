"""What a GPTQ target will be, and plain rounding for targets that no data reaches."""

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
from quantmill_gptq.codec import abstract_form
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.rounding import grid_of, rounded
from quantmill_gptq.widths import period

__all__ = ["GptqQuantizer"]

NO_WORDS = declare("QM-GPTQ-002", "A module's shape does not fill the layout's 32-bit words")


class GptqQuantizer(Quantizer[GptqConfig]):
    """Planning, and rounding to nearest without calibration."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        config = self.config
        width = group_width(config.group_size, target.in_features)
        return abstract_form(
            target,
            config.bits,
            width,
            -(-target.in_features // width),
            config.desc_act,
            torch.float16,
            dtype,
            same=config.sym,
        )

    def check(self, target: Target) -> Iterator[Finding]:
        whole = period(self.config.bits)
        for features, words in ((target.in_features, "width"), (target.out_features, "height")):
            if features % whole:
                yield NO_WORDS(
                    target.name,
                    f"its {words} {features} is no multiple of {whole}, which the layout of"
                    f" {self.config.bits} bits needs",
                    f"keep it float: --skip {target.name}",
                )

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        columns = target.in_features
        width = group_width(self.config.group_size, columns)
        with FiniteCheck(weight.name) as finite:

            def parts() -> Iterator[tuple[int, Affine]]:
                for start, block in weight.row_blocks(whole_bytes(columns, self.config.bits)):
                    rows = block.to(torch.float32)
                    finite.look(rows, start * columns)
                    grid = grid_of(rows, width, self.config)
                    yield start, rounded(rows, grid, width, self.config, weight.dtype)

            return join_rows(parts(), target.out_features)
