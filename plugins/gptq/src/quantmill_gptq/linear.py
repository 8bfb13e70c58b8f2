"""``QuantLinear``: the core's linear under the name by which GPTQ's users know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmill.forms import Affine, Form, Group
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.targeting.types import Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["QuantLinear", "QuantLinearFactory"]


class QuantLinear(FormLinear):
    """A linear whose ``state_dict`` is the layout on disk: qweight, qzeros, scales, g_idx."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        form = self.form
        assert isinstance(form, Affine)
        return form.codes.bits

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        form = self.form
        assert isinstance(form, Affine) and isinstance(form.grouping, Group)
        return form.grouping.size


class QuantLinearFactory(FormLinearFactory):
    """Makes :class:`QuantLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return QuantLinear(form, bias, self.codec, self.kernels, self.dtype)
