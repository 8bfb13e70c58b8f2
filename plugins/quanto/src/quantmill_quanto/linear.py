"""``QLinear``: the core's linear under the name by which Quanto's users know it.

Where activations are quantized, inputs and outputs are rounded by their stored scales. One code
more or less of an output is a whole step, so a product is computed with optimum-quanto's roundings
(``tests/interop/test_quanto_activations.py``):

========================  ==========================================================================
int8 inputs and weights   codes times codes, exact, then the product of both scales in their dtype
an 8-bit float in either  codes of inputs times the weight, dequantized by that product of scales
fewer bits                both dequantized; groups of 128 in bfloat16 by a kernel, as there
========================  ==========================================================================
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quantmill.forms import Affine, Form, Group, ScaledFloat
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill_quanto.config import FLOATS
from quantmill_quanto.forms import joined, parted

if TYPE_CHECKING:
    from quantmill.targeting.types import Target

__all__ = ["QLinear", "QLinearFactory"]

Route = Literal["integers", "floats", "kernel"]


class QLinear(FormLinear):
    """A linear whose ``state_dict`` is the layout on disk: weight._data, weight._scale, ...."""

    @property
    def activations(self) -> str | None:
        """The type of rounded inputs and outputs."""
        kind: str | None = self._codec.config.activations
        return kind

    def _hold(self, form: Form) -> None:
        assert isinstance(form, Affine | ScaledFloat)
        # Kernels know the plain form: the scales wait here.
        plain, self._scales = parted(form)
        self._active = tuple(_or_none(scale) for scale in self._scales)
        self._unrounded = self.activations is None or all(scale is None for scale in self._active)
        self._factor: Tensor | None = None
        self._route: Route = "kernel"
        before = self._active[0]
        if before is not None:
            self._route = _route(plain, self.activations)
        if before is not None and self._route == "integers":
            scale: Any = plain.scale
            both = (before * scale).to(torch.float32)
            wide = scale.to(torch.float32)
            self._factor = torch.where(wide == 0, 0.0, both / wide).reshape(-1)
        if self._route == "floats":
            self.adopt(plain)
        else:
            super()._hold(plain)

    def whole(self, form: Form) -> Form:
        """The form with the scales of its activations."""
        assert isinstance(form, Affine | ScaledFloat)
        return joined(form, self._scales)

    @property
    def live_bytes(self) -> int:
        """Bytes of the weight as it lives here."""
        beside = (*self._scales, self._factor)
        return super().live_bytes + sum(item.nbytes for item in beside if item is not None)

    @property
    def weight_only(self) -> bool:
        return self.activations is None or all(scale is None for scale in self._scales)

    def forward(self, x: Tensor) -> Tensor:
        if self._unrounded:
            # Not the parent's: a compiled graph would guard every class on the way there.
            return self.product(x, self.bias if self.bias is None else self.bias.to(x.dtype))
        before, after = self._active
        result = self.product(x) if before is None else self._rounded_product(x, before)
        if self.bias is not None:
            result = result + self.bias.to(x.dtype)
        if after is not None:
            result = _Rounded.apply(result, after, self.activations) * after.to(x.dtype)
        return result

    def _rounded_product(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = _Rounded.apply(x, scale, self.activations)
        if self._factor is not None:
            # Sums of whole numbers are exact in float32 up to 2**24.
            return (self.product(codes.to(torch.float32)) * self._factor).to(x.dtype)
        if self._route == "kernel":
            return self.product((codes * scale.to(x.dtype)).to(torch.float32)).to(x.dtype)
        form: Any = self.plain()
        if isinstance(form, Affine) and form.codes.bits < 8:
            return nn.functional.linear(codes * scale.to(x.dtype), _dequantized(form, x.dtype))
        weight = replace(form, scale=scale * form.scale).dequantize(x.dtype)
        return nn.functional.linear(codes, weight)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activations is None else f"{text}, activations={self.activations}"


def _route(form: Affine | ScaledFloat, activations: str | None) -> Route:
    """How a product with rounded inputs is computed."""
    if not isinstance(form, Affine):
        return "floats"
    if form.codes.bits == 8:
        return "integers" if activations == "int8" else "floats"
    by_kernel = form.codes.bits == 4 and form.grouping == Group(128)
    return "kernel" if by_kernel and form.dtype == torch.bfloat16 else "floats"


def _dequantized(form: Affine, dtype: torch.dtype) -> Tensor:
    """A weight of fewer than 8 bits, each step rounded to the dtype of scales."""
    values: tuple[Any, Any] = form.scale, form.offset
    scale, offset = (form.grouping.expand(value, form.shape) for value in values)
    codes = form.codes.unpack()
    if form.offset_kind == "zero":
        return ((codes.to(torch.int8) - offset.to(torch.int8)) * scale).to(dtype)
    return (codes * scale + offset).to(dtype)


def _or_none(scale: Tensor | None) -> Tensor | None:
    """A scale of 1 is what modules without quantized activations have."""
    stored = scale is not None and not scale.is_meta
    return None if stored and float(scale) == 1.0 else scale  # type: ignore[arg-type]


class _Rounded(torch.autograd.Function):
    """Codes of activations for a scale; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, kind: str) -> Tensor:
        ctx.scale = scale.to(x.dtype)
        codes = x / ctx.scale
        if kind in FLOATS:
            narrow: torch.dtype = getattr(torch, FLOATS[kind])
            top = torch.finfo(narrow).max
            return codes.clamp(-top, top).to(narrow).to(x.dtype)
        return torch.round(codes).clamp(-128.0, 127.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] / ctx.scale, None, None


class QLinearFactory(FormLinearFactory):
    """Makes :class:`QLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return QLinear(form, bias, self.codec, self.kernels, self.dtype)

    def resident_bytes(self, form: Form) -> int:
        plain, beside, route = self._parts(form)
        if route == "integers":
            beside += 4 * plain.shape[0]
        return (plain.nbytes if route == "floats" else super().resident_bytes(plain)) + beside

    def forward_bytes(self, form: Form, dtype: torch.dtype) -> int:
        plain, _, route = self._parts(form)
        if route == "floats":
            return prod(plain.shape) * dtype.itemsize
        return super().forward_bytes(plain, dtype)

    def _parts(self, form: Form) -> tuple[Affine | ScaledFloat, int, Route]:
        """The plain form, the bytes of the scales of activations, how they are computed with."""
        assert isinstance(form, Affine | ScaledFloat)
        plain, scales = parted(form)
        active = self.codec.config.activations
        rounds = active is not None and _or_none(scales[0]) is not None
        held = sum(scale.nbytes for scale in scales if scale is not None)
        return plain, held, _route(plain, active) if rounds else "kernel"
