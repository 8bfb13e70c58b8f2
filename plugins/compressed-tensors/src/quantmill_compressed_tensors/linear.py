"""``CompressedLinear``: the core's linear, with its inputs quantized where the group says so.

Activations are rounded to the grid and taken back to float (fake quantization), in the dtype they
have, as compressed-tensors 0.20 does in its own forward: what vLLM's integer kernels compute, up
to the rounding of sums.
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
from quantmill_compressed_tensors.forms import StoredAffine, StoredFloat
from quantmill_compressed_tensors.fp4 import StoredFp4
from quantmill_compressed_tensors.schemes import Args

__all__ = ["CompressedLinear", "CompressedLinearFactory", "quantize_inputs"]


_KEPT = ("input_scale", "input_zero_point", "whole", "inputs")
"""Tensors that a kernel's layout has no place for."""


class CompressedLinear(FormLinear):
    """A linear whose ``state_dict`` is the layout on disk."""

    def __init__(
        self,
        form: Form,
        bias: Tensor | None,
        codec: Codec[Any],
        kernels: KernelRegistry,
        dtype: str = "bfloat16",
        inputs: Args | None = None,
    ) -> None:
        """``inputs`` says how activations are quantized; None leaves them float."""
        super().__init__(form, bias, codec, kernels, dtype)
        self.inputs = inputs

    def _hold(self, form: Form) -> None:
        # A kernel's layout has no place for them, so they are kept here.
        self._kept = _kept(form)
        super()._hold(_with(form, dict.fromkeys(self._kept)))

    def whole(self, form: Form) -> Form:
        """The form with the scales that wait here."""
        return _with(form, self._kept)

    @property
    def live_bytes(self) -> int:
        """Bytes of the weight as it lives here."""
        return super().live_bytes + sum(item.nbytes for item in self._kept.values())

    @property
    def weight_only(self) -> bool:
        return self.inputs is None

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None and x.numel():
            given = self._kept.get("input_scale"), self._kept.get("input_zero_point")
            x = _Rounded.apply(x, self.inputs, *given)
        return super().forward(x)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.inputs is None else f"{text}, inputs={self.inputs.words}"


class _Rounded(torch.autograd.Function):
    """Quantized inputs, with the gradient passed straight through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, args: Args, scale: Tensor | None, zero: Tensor | None
    ) -> Tensor:
        return quantize_inputs(x, args, scale, zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


def quantize_inputs(
    x: Tensor, args: Args, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """``x [..., in]`` rounded to the grid of ``args``, in its own dtype.

    ``scale`` and ``zero`` (one value each) are those of static quantization; without them each
    token, group of a token or the whole of ``x`` gives its own.
    """
    if args.type == "float":
        low, high = -448.0, 448.0
    else:
        low, high = -(2.0 ** (args.num_bits - 1)), 2.0 ** (args.num_bits - 1) - 1
    shape = x.shape
    if args.dynamic:
        if args.means in ("group", "tensor_group") and args.group_size:
            x = x.unflatten(-1, (-1, args.group_size))
        scale, zero = _measured(x, args, low, high)
    elif scale is None:
        return x
    else:
        scale = scale.to(x.dtype).reshape(())
        zero = None if zero is None or args.symmetric else zero.to(x.dtype).reshape(())
    codes = x / scale
    if zero is not None:
        codes = codes + zero
    codes = codes.clamp(low, high)
    if args.type == "float":
        codes = codes.to(torch.float8_e4m3fn).to(x.dtype)
    else:
        codes = torch.round(codes)
    if zero is not None:
        codes = codes - zero
    return (codes * scale).reshape(shape)


def _measured(x: Tensor, args: Args, low: float, high: float) -> tuple[Tensor, Tensor | None]:
    """Scales (and zero points) from the range of ``x``, widened to zero."""
    if args.means == "tensor":
        least, most = (item.reshape([1] * x.ndim) for item in torch.aminmax(x))
    else:
        least, most = torch.aminmax(x, dim=-1, keepdim=True)
    least, most = least.clamp(max=0), most.clamp(min=0)
    tiny = torch.finfo(x.dtype).eps
    if args.symmetric:
        scale = torch.maximum(-least, most) / ((high - low) / 2)
        return torch.where(scale == 0, tiny, scale), None
    scale = (most - least) / (high - low)
    scale = torch.where(scale == 0, tiny, scale)
    return scale, torch.round((low - least / scale).clamp(low, high))


def _kept(form: Form) -> dict[str, Tensor]:
    """What a form has beside the weight."""
    known = isinstance(form, StoredAffine | StoredFloat | StoredFp4)
    found = {name: getattr(form, name, None) for name in _KEPT if known}
    return {name: value for name, value in found.items() if value is not None}


def _with(form: Form, kept: Mapping[str, Any]) -> Form:
    return replace(form, **kept) if kept else form  # type: ignore[type-var]


class CompressedLinearFactory(FormLinearFactory):
    """Makes :class:`CompressedLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        group = self.config.scheme_of(target)
        inputs = None if group is None else group.input_activations
        if inputs is not None and (inputs.type, inputs.num_bits) == ("float", 4):
            inputs = None  # a finding says so
        return CompressedLinear(form, bias, self.codec, self.kernels, self.dtype, inputs)

    def resident_bytes(self, form: Form) -> int:
        kept = _kept(form)
        plain = _with(form, dict.fromkeys(kept))
        return super().resident_bytes(plain) + sum(item.nbytes for item in kept.values())
