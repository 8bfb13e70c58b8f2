"""The core's forms with the scales of activations that a file has beside them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from quantmill.forms import Affine, ScaledFloat

__all__ = ["ActiveAffine", "ActiveFloat", "joined", "parted"]

Scales = tuple[Tensor | None, Tensor | None]
"""Of inputs and outputs, each a scalar; 1 where they are not quantized."""


@dataclass(frozen=True, slots=True, eq=False)
class ActiveAffine(Affine):
    """Integers of a module whose activations are quantized."""

    input_scale: Tensor | None = None
    output_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ActiveFloat(ScaledFloat):
    """8-bit floats of a module whose activations are quantized."""

    input_scale: Tensor | None = None
    output_scale: Tensor | None = None


def joined(form: Affine | ScaledFloat, scales: Scales) -> Affine | ScaledFloat:
    """The form with scales of activations; the same form where there are none."""
    if scales == (None, None):
        return form
    plain, _ = parted(form)
    made: Any = ActiveAffine if isinstance(plain, Affine) else ActiveFloat
    values = {item.name: getattr(plain, item.name) for item in fields(plain)}
    found: Affine | ScaledFloat = made(**values, input_scale=scales[0], output_scale=scales[1])
    return found


def parted(form: Affine | ScaledFloat) -> tuple[Affine | ScaledFloat, Scales]:
    """The plain form, which kernels know, and the scales of activations."""
    if not isinstance(form, ActiveAffine | ActiveFloat):
        return form, (None, None)
    base: Any = Affine if isinstance(form, ActiveAffine) else ScaledFloat
    values = {item.name: getattr(form, item.name) for item in fields(base)}
    return base(**values), (form.input_scale, form.output_scale)
