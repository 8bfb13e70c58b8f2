"""``CompressedLinear``: the core's linear, with its inputs quantized where the group says so.

Activations are rounded as :mod:`quantmill_compressed_tensors.inputs` says; the weight's kernel
computes with the result.
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
from quantmill_compressed_tensors.inputs import is_applied, quantize_inputs
from quantmill_compressed_tensors.schemes import Args

__all__ = ["CompressedLinear", "CompressedLinearFactory"]


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
            x = _Rounded.apply(x, self.inputs, self._kept)
        return super().forward(x)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.inputs is None else f"{text}, inputs={self.inputs.words}"


class _Rounded(torch.autograd.Function):
    """Quantized inputs, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, args: Args, given: Mapping[str, Tensor]) -> Tensor:
        return quantize_inputs(x, args, given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


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
        if inputs is not None and not is_applied(inputs):
            inputs = None  # a finding says so
        return CompressedLinear(form, bias, self.codec, self.kernels, self.dtype, inputs)

    def resident_bytes(self, form: Form) -> int:
        kept = _kept(form)
        plain = _with(form, dict.fromkeys(kept))
        return super().resident_bytes(plain) + sum(item.nbytes for item in kept.values())
