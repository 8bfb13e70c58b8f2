"""The core's scaled float form, with the activation scale that a file may hold beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantmill.forms import Grouping, PerTensor, ScaledFloat

__all__ = ["Fp8Weight", "Layout", "abstract_form", "joined", "parted"]

VALUES = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file holds a weight, where it differs from what is written anew."""

    scale: str = ""
    """Name of the scales; empty for the layout's first."""
    activation: str = ""
    """Name of the scale of activations."""
    shape: tuple[int, ...] | None = None
    """Shape of the scales."""
    as_bytes: bool = False
    """Powers of two as uint8."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight(ScaledFloat):
    """A weight of a file."""

    layout: Layout = Layout()
    activation: Tensor | None = None
    """``activation_scale`` (static scheme) or ``input_scale_ub`` (FBGEMM), a single float. It says
    nothing about the weight's values."""


def joined(form: ScaledFloat, activation: Tensor | None) -> ScaledFloat:
    """The form with an activation scale; the same form for None."""
    if activation is None:
        return form
    if isinstance(form, Fp8Weight):
        return replace(form, activation=activation)
    return Fp8Weight(form.values, form.scale, form.grouping, form.dtype, activation=activation)


def parted(form: ScaledFloat) -> tuple[ScaledFloat, Tensor | None]:
    """The form without the activation scale, of which kernels know nothing, and that scale."""
    if not isinstance(form, Fp8Weight) or form.activation is None:
        return form, None
    return replace(form, activation=None), form.activation


def abstract_form(
    shape: tuple[int, int],
    grouping: Grouping,
    scale: torch.dtype,
    dtype: torch.dtype,
    layout: Layout | None = None,
) -> Fp8Weight:
    """A form ``[out, in]`` on the meta device."""
    layout = layout or Layout()
    wanted = grouping.scale_shape(shape)
    if isinstance(grouping, PerTensor) and layout.shape is not None:
        wanted = layout.shape
    return Fp8Weight(
        torch.empty(shape, dtype=VALUES, device="meta"),
        torch.empty(wanted, dtype=scale, device="meta"),
        grouping,
        dtype,
        layout,
    )
