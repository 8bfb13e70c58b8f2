"""``TorchaoLinear``: the core's linear, with its inputs rounded where the config says so.

Rounded inputs are integers or 8-bit floats times a scale per row or for all. Both are exact in the
16-bit formats, so a product with them is a kernel's product of the weight, times the scale. On a
CUDA device torchao's own tensor computes it in 8 bits; elsewhere results are rounded where it
rounds them, for the codes of the next layer follow from the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.backend import Codec
from quantmill.forms import Form
from quantmill.kernels import KernelRegistry
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.targeting.types import Target
from quantmill_torchao.foreign import stored_form
from quantmill_torchao.forms import AoAffine, AoFloat
from quantmill_torchao.notes import inputs_of, parse
from quantmill_torchao.recipes import Inputs
from quantmill_torchao.tensors import to_tensor

__all__ = ["TorchaoLinear", "TorchaoLinearFactory", "rounded_inputs"]

_KEPT = ("float_zero", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
"""Tensors that a kernel's layout has no place for."""
_NATIVE = ("Int8Tensor", "Float8Tensor")
"""Tensors whose products torchao computes in 8 bits on CUDA."""


class TorchaoLinear(FormLinear):
    """A linear whose ``state_dict`` is the layout on disk."""

    inputs: Inputs | None = None
    """How activations are rounded."""

    def __init__(
        self,
        form: Form,
        bias: Tensor | None,
        codec: Codec[Any],
        kernels: KernelRegistry,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__(stored_form(form, codec.config), bias, codec, kernels, dtype)

    def _hold(self, form: Form) -> None:
        assert isinstance(form, AoAffine | AoFloat)
        note = parse(form.layout.note)
        self.inputs = None if note is None else inputs_of(note)
        self._kept = _kept(form)
        self._native: Tensor | None = None
        self._rows = _row_scales(form, self.inputs)
        super()._hold(_with(form, dict.fromkeys(self._kept)))
        device = next(iter(form.tensors().values())).device
        if device.type == "cuda" and self.inputs and form.layout.tensor in _NATIVE:
            self.keep(self.plain())
            if torch.cuda.get_device_capability(device) >= (8, 9):
                self._native = to_tensor(self.form)

    def whole(self, form: Form) -> Form:
        """The form with the tensors that wait here."""
        return _with(form, self._kept)

    @property
    def live_bytes(self) -> int:
        """Bytes of the weight as it lives here."""
        held = sum(item.nbytes for item in self._kept.values())
        return super().live_bytes + held + (0 if self._rows is None else self._rows.nbytes)

    @property
    def weight_only(self) -> bool:
        return self.inputs is None and "act_pre_scale" not in self._kept

    def forward(self, x: Tensor) -> Tensor:
        before = self._kept.get("act_pre_scale")
        if before is not None:
            x = x * before.to(x.dtype)
        if self.inputs is None or not x.numel():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._native is not None and not (x.requires_grad and torch.is_grad_enabled()):
            return nn.functional.linear(x, self._native, bias)
        codes, scale, zero = _Rounded.apply(
            x,
            self.inputs,
            self._kept.get("act_quant_scale"),
            self._kept.get("act_quant_zero_point"),
        )
        if self._rows is not None:
            result = self._by_rows(codes, scale, zero)
            return (result if bias is None else result + bias).to(x.dtype)
        # The product of whole numbers first: the scale of a row comes out of its sum.
        result = (self.product(codes) * scale).to(x.dtype)
        return result if bias is None else result + bias

    def _by_rows(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """A product with integers, in float32: rounded before the weight's scales follow."""
        assert self._rows is not None
        sums = self.product(codes.to(torch.float32)) / self._rows
        if not sums.requires_grad:
            sums = sums.round_()  # Whole numbers, but for what the scales' rounding left.
        if zero is None:
            return (sums * scale).to(codes.dtype) * self._rows
        # There the zero point of inputs is taken off last.
        ones = codes.new_ones(1, codes.shape[-1], dtype=torch.float32)
        across = (self.product(ones) / self._rows).round()
        whole = ((sums + zero * across) * scale).to(codes.dtype)
        return (whole - (zero * scale * across).to(codes.dtype)) * self._rows


class _Rounded(torch.autograd.Function):
    """Codes and scales of inputs; gradients of inputs pass straight through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inputs: Inputs, scale: Tensor | None, zero: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        codes, scale, zero = rounded_inputs(x, inputs, scale, zero)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(*(item for item in (scale, zero) if item is not None))
        return codes, scale, zero

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        return (grads[0] / scale).to(grads[0].dtype), None, None, None


def rounded_inputs(
    x: Tensor, inputs: Inputs, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs as ``codes * scale``.

    Args:
        x: float ``[..., in]``.
        inputs: how they are rounded.
        scale: float, one value, of static quantization; else it is taken from ``x``.
        zero: its zero point, if it has one.

    Returns:
        Codes (whole numbers or 8-bit floats, less their zero point) in the dtype of ``x``, float32
        scales that broadcast against a product with them, and the zero point if there is one.
    """
    work = x.to(torch.float32)
    shape = x.shape
    if inputs.grain.kind == "block":
        size = inputs.grain.size[1]
        work = torch.nn.functional.pad(work, (0, -shape[-1] % size)).unflatten(-1, (-1, size))
    dims = tuple(range(work.ndim)) if inputs.grain.kind == "tensor" else (-1,)
    if inputs.kind == "float8":
        kind: torch.dtype = getattr(torch, inputs.dtype)
        top = torch.finfo(kind).max
        if scale is None:
            most = work.abs().amax(dims, keepdim=True)
            if inputs.low is not None or inputs.high is not None:
                most = most.clamp(inputs.low, inputs.high)
            scale = most / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes, zero = (work / scale).clamp_(-top, top).to(kind).to(torch.float32), None
    else:
        codes, scale, zero = _whole(x, inputs, scale, zero)
    if inputs.grain.kind == "block":
        # Scales within a row can't be taken out of its sum.
        whole = (codes * scale).flatten(-2)[..., : shape[-1]]
        return whole.to(x.dtype), torch.ones((), device=x.device), None
    return codes.to(x.dtype), scale, zero


def _whole(
    x: Tensor, inputs: Inputs, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers in float32, less their zero point; their scale and the zero point, as torchao
    computes them."""
    least, most = (-64.0, 63.0) if inputs.reduced else (-128.0, 127.0)
    if scale is None:
        dims = tuple(range(x.ndim)) if inputs.grain.kind == "tensor" else (-1,)
        low = x.amin(dims, keepdim=True).clamp(max=0)
        high = x.amax(dims, keepdim=True).clamp(min=0)
        tiny = torch.finfo(x.dtype).smallest_normal if inputs.narrow else torch.finfo().eps
        if inputs.symmetric:
            scale = (torch.maximum(-low, high) / ((most - least) / 2)).clamp(min=tiny)
        else:
            scale = ((high - low) / (most - least)).clamp(min=tiny)
            zero = (least - torch.round(low / scale)).clamp(least, most)
    elif inputs.symmetric:
        zero = None
    if not inputs.narrow:
        scale = scale.to(torch.float32)
    codes = torch.round(x * (1.0 / scale)).to(torch.float32)
    scale = scale.to(torch.float32)
    if zero is None:
        return codes.clamp(least, most), scale, None
    zero = zero.to(torch.float32)
    return (codes + zero).clamp(least, most) - zero, scale, zero


def _row_scales(form: AoAffine | AoFloat, inputs: Inputs | None) -> Tensor | None:
    """A scale per row of an int8 weight, or one, where inputs are integers; None elsewhere."""
    if inputs is None or inputs.kind != "int8" or form.layout.tensor != "Int8Tensor":
        return None
    scale: Any = form.scale
    if scale.numel() not in (1, form.shape[0]):
        return None
    found = scale.to(torch.float32).reshape(-1)
    return torch.where(found == 0, torch.ones_like(found), found)


def _with(form: Form, kept: Mapping[str, Any]) -> Form:
    return replace(form, **kept) if isinstance(form, AoAffine) else form


def _kept(form: AoAffine | AoFloat) -> dict[str, Tensor]:
    found = {name: getattr(form, name, None) for name in _KEPT}
    return {name: value for name, value in found.items() if value is not None}


class TorchaoLinearFactory(FormLinearFactory):
    """Makes :class:`TorchaoLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return TorchaoLinear(form, bias, self.codec, self.kernels, self.dtype)

    def resident_bytes(self, form: Form) -> int:
        form = stored_form(form, self.config)
        kept = _kept(form)
        plain = _with(form, dict.fromkeys(kept))
        assert isinstance(form, AoAffine | AoFloat)
        note = parse(form.layout.note)
        rows = _row_scales(form, None if note is None else inputs_of(note))
        beside = [*kept.values(), *([] if rows is None else [rows])]
        return super().resident_bytes(plain) + sum(item.nbytes for item in beside)
