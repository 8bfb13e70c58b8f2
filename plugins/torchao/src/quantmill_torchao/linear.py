"""``TorchaoLinear``: the core's linear, with its inputs rounded where the config says so.

Rounded inputs are integers or 8-bit floats times a scale per row or for all. Both are exact in the
16-bit formats, so a product with them is a kernel's product of the weight, times the scale. On a
CUDA device torchao's own tensor computes it in 8 bits.
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
        super()._hold(_with(form, dict.fromkeys(self._kept)))
        device = next(iter(form.tensors().values())).device
        if device.type == "cuda" and self.inputs and form.layout.tensor in _NATIVE:
            self._live, self._ways = self.plain(), {}
            if torch.cuda.get_device_capability(device) >= (8, 9):
                self._native = to_tensor(self.form)

    def whole(self, form: Form) -> Form:
        """The form with the tensors that wait here."""
        return _with(form, self._kept)

    @property
    def live_bytes(self) -> int:
        """Bytes of the weight as it lives here."""
        return super().live_bytes + sum(item.nbytes for item in self._kept.values())

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
        codes, scale = _Rounded.apply(
            x,
            self.inputs,
            self._kept.get("act_quant_scale"),
            self._kept.get("act_quant_zero_point"),
        )
        # The product of whole numbers first: the scale of a row comes out of its sum.
        result = (self.product(codes) * scale).to(x.dtype)
        return result if bias is None else result + bias


class _Rounded(torch.autograd.Function):
    """Codes and scales of inputs; gradients of inputs pass straight through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inputs: Inputs, scale: Tensor | None, zero: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        codes, scale = rounded_inputs(x, inputs, scale, zero)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale)
        return codes, scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        return (grads[0] / scale).to(grads[0].dtype), None, None, None


def rounded_inputs(
    x: Tensor, inputs: Inputs, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs as ``codes * scale``.

    Args:
        x: float ``[..., in]``.
        inputs: how they are rounded.
        scale: float, one value, of static quantization; else it is taken from ``x``.
        zero: its zero point, if it has one.

    Returns:
        Codes (whole numbers or 8-bit floats, less their zero point) in the dtype of ``x``, and
        float32 scales that broadcast against a product with them.
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
        codes = (work / scale).clamp_(-top, top).to(kind).to(torch.float32)
    else:
        least, most_code = (-64.0, 63.0) if inputs.reduced else (-128.0, 127.0)
        if scale is None:
            low = work.amin(dims, keepdim=True).clamp(max=0)
            high = work.amax(dims, keepdim=True).clamp(min=0)
            tiny = torch.finfo(torch.float32).eps
            if inputs.symmetric:
                scale = torch.maximum(-low, high) / ((most_code - least) / 2)
            else:
                scale = (high - low).to(x.dtype).to(torch.float32) / (most_code - least)
            # torchao divides in the dtype of the inputs; with another scale codes would differ.
            scale = scale.to(x.dtype).to(torch.float32).clamp(min=tiny)
            if not inputs.symmetric:
                zero = (least - torch.round(low / scale)).clamp(least, most_code)
        else:
            scale = scale.to(torch.float32)
            zero = None if zero is None or inputs.symmetric else zero.to(torch.float32)
        codes = torch.round(work / scale)
        codes = codes if zero is None else codes + zero
        codes = codes.clamp(least, most_code)
        codes = codes if zero is None else codes - zero
    if inputs.grain.kind == "block":
        # Scales within a row can't be taken out of its sum.
        whole = (codes * scale).flatten(-2)[..., : shape[-1]]
        return whole.to(x.dtype), torch.ones((), device=x.device)
    return codes.to(x.dtype), scale


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
        return super().resident_bytes(plain) + sum(item.nbytes for item in kept.values())
