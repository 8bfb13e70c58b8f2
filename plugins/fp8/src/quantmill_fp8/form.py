"""The core's scaled float form, with the activation scale that a file may hold beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantmill.forms import Grouping, ScaledFloat

__all__ = ["Fp8Weight", "abstract_form", "joined", "parted"]

VALUES = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight(ScaledFloat):
    """A weight whose inputs have a stored scale. It says nothing about the weight's values."""

    activation: Tensor | None = None
    """``activation_scale`` (static scheme) or ``input_scale_ub`` (FBGEMM), a single float."""


def joined(form: ScaledFloat, activation: Tensor | None) -> ScaledFloat:
    """The form with an activation scale; the same form for None."""
    if activation is None:
        return form
    return Fp8Weight(form.values, form.scale, form.grouping, form.dtype, activation)


def parted(form: ScaledFloat) -> tuple[ScaledFloat, Tensor | None]:
    """The plain form, which kernels know, and the activation scale."""
    if not isinstance(form, Fp8Weight):
        return form, None
    return ScaledFloat(form.values, form.scale, form.grouping, form.dtype), form.activation


def abstract_form(
    shape: tuple[int, int],
    grouping: Grouping,
    scale: torch.dtype,
    dtype: torch.dtype,
    scale_shape: tuple[int, ...] | None = None,
) -> ScaledFloat:
    """A form ``[out, in]`` on the meta device."""
    wanted = grouping.scale_shape(shape) if scale_shape is None else scale_shape
    return ScaledFloat(
        torch.empty(shape, dtype=VALUES, device="meta"),
        torch.empty(wanted, dtype=scale, device="meta"),
        grouping,
        dtype=dtype,
    )
