"""``QLinear``: the core's linear under the name by which Quanto's users know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmill.linear import FormLinear, FormLinearFactory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantmill.forms import Form
    from quantmill.targeting.types import Target

__all__ = ["QLinear", "QLinearFactory"]


class QLinear(FormLinear):
    """A linear whose ``state_dict`` is the layout on disk: weight._data, weight._scale, ...."""


class QLinearFactory(FormLinearFactory):
    """Makes :class:`QLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return QLinear(form, bias, self.codec, self.kernels, self.dtype)
