"""The core's own linear: holds any form, computes with the chosen kernel or the reference.

Methods without a linear of their own use it. Its ``state_dict`` is what the codec encodes, under
the layout's own names, whatever a kernel did to the live copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantmill.backend import Codec, LinearFactory
from quantmill.forms import Form
from quantmill.kernels import KernelRegistry
from quantmill.targeting.types import Target

__all__ = ["FormLinear", "FormLinearFactory"]


class FormLinear(nn.Module):
    """``y = x @ W.T + bias`` with ``W`` held as a form, ``[out, in]``."""

    def __init__(
        self, form: Form, bias: Tensor | None, codec: Codec[Any], kernels: KernelRegistry
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = form.shape[-2:]
        self._form = form
        self._codec = codec
        self._kernels = kernels
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def form(self) -> Form:
        """The form this module computes with."""
        return self._form

    def forward(self, x: Tensor) -> Tensor:
        choice = self._kernels.choose(
            "matmul",
            self._form.kind,
            self._form.traits(),
            device=x.device.type,
            dtype=str(x.dtype).removeprefix("torch."),
            rows=x.numel() // max(1, x.shape[-1]),
        )
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        if choice is None or x.requires_grad:
            return self._form.matmul(x, bias)
        result: Tensor = choice.load()(x, self._form, bias)
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> FormLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def move(tensor: Tensor) -> Tensor:
            # .to(dtype) must not touch codes and scales: only follow a change of device.
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._form = self._form.map_tensors(move)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._codec.encode(self._form).items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, form={self._form.kind}"


class FormLinearFactory(LinearFactory[Any]):
    """Makes :class:`FormLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return FormLinear(form, bias, self.codec, self.kernels)

    def form_of(self, module: nn.Module) -> Form | None:
        return module.form if isinstance(module, FormLinear) else None
