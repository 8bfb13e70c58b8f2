"""How far a quantized weight's output is from the float one's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.forms import Form

__all__ = ["JUDGED", "SEARCHED", "evenly", "relative_error", "relative_loss"]

SEARCHED = 256
"""Rows of a weight that are enough to choose by."""
JUDGED = 128
"""Rows that are enough to say how large the error is."""


def evenly(rows: int, device: torch.device, most: int) -> Tensor:
    """Numbers of at most ``most`` evenly spaced rows, int64."""
    count = min(rows, most)
    return (torch.arange(count, device=device) * (rows / count)).to(torch.int64)


def relative_loss(weight: Tensor, form: Form, square: Tensor) -> float:
    """Squared error of the output of ``form`` over the squared output of ``weight [out, in]``, of
    evenly spaced rows, for inputs whose second moments are ``square``, float32 ``[in, in]``."""
    index = evenly(weight.shape[0], weight.device, JUDGED)
    return relative_error(weight[index], form.dequantize(torch.float32)[index], square)


def relative_error(rows: Tensor, rounded: Tensor, square: Tensor) -> float:
    """The same of ``rows [n, in]`` and what they were rounded to."""
    exact = rows.to(torch.float32)
    error = rounded - exact
    energy = (exact @ square).mul_(exact).sum().clamp(min=1e-30)
    return float((error @ square).mul_(error).sum() / energy)
