"""``FP8Linear``: the core's linear under the peers' name, and with a stored activation scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmill.forms import Form, ScaledFloat
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.targeting.types import Target
from quantmill_fp8.form import joined, parted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["FP8Linear", "FP8LinearFactory"]


class FP8Linear(FormLinear):
    """``y = x @ W.T + bias``, activations as they come; its ``state_dict`` is the file's layout."""

    activation: Tensor | None = None
    """The stored scale of the inputs, kept for saving."""

    def _hold(self, form: Form) -> None:
        assert isinstance(form, ScaledFloat)
        # Kernels prepare and restore the plain form: the scale waits here.
        plain, self.activation = parted(form)
        super()._hold(plain)

    @property
    def form(self) -> Form:
        """The form this module computes with, and its activation scale."""
        form = super().form
        assert isinstance(form, ScaledFloat)
        return joined(form, self.activation)


class FP8LinearFactory(FormLinearFactory):
    """Makes :class:`FP8Linear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return FP8Linear(form, bias, self.codec, self.kernels, self.dtype)

    def resident_bytes(self, form: Form) -> int:
        assert isinstance(form, ScaledFloat)
        plain, activation = parted(form)
        return super().resident_bytes(plain) + (0 if activation is None else activation.nbytes)
