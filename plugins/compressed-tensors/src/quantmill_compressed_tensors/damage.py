"""What is refused of a weight's tensors: contradictions, and scales of no weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare
from quantmill.forms import Form
from quantmill.targeting.types import Target
from quantmill_compressed_tensors.forms import StoredAffine, StoredFloat

__all__ = ["refuse", "sound"]

BAD_TENSORS = declare("QM-CT-001", "A quantized weight's tensors contradict each other")
BAD_SCALE = declare("QM-CT-004", "A scale of a quantized weight is no scale")


def refuse(target: Target, cause: str) -> QuantmillError:
    """The error for tensors that contradict each other."""
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


def sound(form: StoredAffine | StoredFloat, target: Target) -> Form:
    """The form, unless its scales can't be those of any weight."""
    scale = form.scale
    assert isinstance(scale, Tensor)
    scale = scale.to(torch.float32) if scale.element_size() == 1 else scale
    bad = ~(torch.isfinite(scale) & (scale >= 0))
    if bool(bad.any()):
        index = int(torch.argmax(bad.reshape(-1).to(torch.uint8)).item())
        raise _bad_scale(target, f"{float(scale.reshape(-1)[index])} at element {index}")
    zero = scale == 0
    # A scale of zero is what some writers give to rows of zeros: nothing else may be under it.
    if bool(zero.any()) and bool(replace(form, scale=zero.to(scale.dtype)).dequantize().any()):
        raise _bad_scale(target, "0 for weights that are not")
    return form


def _bad_scale(target: Target, what: str) -> QuantmillError:
    return QuantmillError(
        BAD_SCALE(
            target.name,
            f"weight_scale is {what}, and a scale is finite and positive",
            "the checkpoint is damaged: get it again",
        )
    )
