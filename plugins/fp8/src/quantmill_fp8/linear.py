"""``FP8Linear``: the core's linear under the peers' name, in 8 bits where the device computes them.

On Ada, Hopper and newer, activations are rounded to 8 bits and multiplied as
:mod:`quantmill_fp8.native` does. Everywhere else, for gradients, and for float32, activations are
as they come and the best kernel reads the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantmill.backend import Codec
from quantmill.forms import Form, ScaledFloat
from quantmill.kernels import KernelRegistry
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.targeting.types import Target
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config
from quantmill_fp8.form import joined, parted
from quantmill_fp8.native import BLOCK, Product, kind_of, unavailable, unfit

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FP8Linear", "FP8LinearFactory"]


class FP8Linear(FormLinear):
    """``y = x @ W.T + bias``; its ``state_dict`` is the file's layout."""

    activation: Tensor | None = None
    """The stored scale of the inputs."""

    def __init__(
        self,
        form: Form,
        bias: Tensor | None,
        codec: Codec[Any],
        kernels: KernelRegistry,
        dtype: str = "bfloat16",
    ) -> None:
        config = codec.config
        self.bound = config.activation_scale_ub if isinstance(config, FbgemmFp8Config) else None
        """The largest magnitude that activations are scaled for."""
        self.static = isinstance(config, Fp8Config) and config.activation_scheme == "static"
        super().__init__(form, bias, codec, kernels, dtype)

    def _hold(self, form: Form) -> None:
        assert isinstance(form, ScaledFloat)
        # Kernels prepare and restore the plain form: the scale waits here.
        plain, self.activation = parted(form)
        self.native = _native(plain, str(plain.values.device))
        """Whether it computes in 8 bits."""
        if self.native:
            # The product reads the weight as it is: no kernel's layout is made of it.
            self.keep(plain)
            rounding = rounding_kernel(self._kernels, plain, self._dtype)
            self.eight_bit = Product(plain, self.bound, rounding)
        else:
            super()._hold(plain)

    def whole(self, form: Form) -> Form:
        """The form with its activation scale."""
        assert isinstance(form, ScaledFloat)
        return joined(form, self.activation)

    @property
    def weight_only(self) -> bool:
        return not self.native

    def forward(self, x: Tensor) -> Tensor:
        grads = x.requires_grad and torch.is_grad_enabled()
        if not self.native or grads or x.dtype == torch.float32 or not x.numel():
            return super().forward(x)
        result = self.eight_bit(x, self.activation if self.static else None)
        return result if self.bias is None else result + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", 8-bit activations" if self.native else "")


def _native(form: ScaledFloat, device: str) -> bool:
    kind = kind_of(form.grouping)
    if not device.startswith("cuda") or kind is None or unfit(form) is not None:
        return False
    return unavailable(kind, device) is None


def rounding_kernel(
    kernels: KernelRegistry, form: ScaledFloat, dtype: str
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel that rounds the activations of a product with ``form``, if there is one."""
    size = (BLOCK,) if kind_of(form.grouping) == "block" else None
    choice = kernels.choose(
        "activations",
        "scaled_float",
        {"values": "float8_e4m3fn", "group_size": size},
        device=str(form.values.device),
        dtype=dtype,
    )
    return None if choice is None else choice.load()


class FP8LinearFactory(FormLinearFactory):
    """Makes :class:`FP8Linear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return FP8Linear(form, bias, self.codec, self.kernels, self.dtype)

    def resident_bytes(self, form: Form) -> int:
        assert isinstance(form, ScaledFloat)
        plain, activation = parted(form)
        if _native(plain, self.device):
            return form.nbytes
        return super().resident_bytes(plain) + (0 if activation is None else activation.nbytes)
