"""``QLinear``: the core's linear under the name by which Quanto's users know it.

Where activations are quantized, inputs and outputs are rounded by their stored scales. Codes of
inputs are exact in 16 bits, so the product is a kernel's, times the scale. Activations are divided
in their own dtype: scales were calibrated so, and another code is another model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantmill.backend import Codec
from quantmill.forms import Affine, Form, ScaledFloat
from quantmill.kernels import KernelRegistry
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill_quanto.config import FLOATS
from quantmill_quanto.forms import joined, parted

if TYPE_CHECKING:
    from torch import nn

    from quantmill.targeting.types import Target

__all__ = ["QLinear", "QLinearFactory"]


class QLinear(FormLinear):
    """A linear whose ``state_dict`` is the layout on disk: weight._data, weight._scale, ...."""

    def __init__(
        self,
        form: Form,
        bias: Tensor | None,
        codec: Codec[Any],
        kernels: KernelRegistry,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__(form, bias, codec, kernels, dtype)
        self.activations: str | None = codec.config.activations

    def _hold(self, form: Form) -> None:
        assert isinstance(form, Affine | ScaledFloat)
        # Kernels know the plain form: the scales wait here.
        plain, self._scales = parted(form)
        self._active = tuple(_or_none(scale) for scale in self._scales)
        super()._hold(plain)

    def whole(self, form: Form) -> Form:
        """The form with the scales of its activations."""
        assert isinstance(form, Affine | ScaledFloat)
        return joined(form, self._scales)

    @property
    def live_bytes(self) -> int:
        """Bytes of the weight as it lives here."""
        return super().live_bytes + sum(s.nbytes for s in self._scales if s is not None)

    @property
    def weight_only(self) -> bool:
        return self.activations is None or all(scale is None for scale in self._scales)

    def forward(self, x: Tensor) -> Tensor:
        before, after = self._active
        if self.activations is None or (before is None and after is None):
            return super().forward(x)
        result = x
        if before is not None:
            result = _Rounded.apply(x, before, self.activations)
        result = self.product(result)
        if before is not None:
            result = (result.to(torch.float32) * before.to(torch.float32)).to(x.dtype)
        if self.bias is not None:
            result = result + self.bias.to(x.dtype)
        if after is not None:
            result = _Rounded.apply(result, after, self.activations) * after.to(x.dtype)
        return result

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activations is None else f"{text}, activations={self.activations}"


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
        assert isinstance(form, Affine | ScaledFloat)
        plain, scales = parted(form)
        return super().resident_bytes(plain) + sum(s.nbytes for s in scales if s is not None)
