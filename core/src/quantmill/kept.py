"""Linears that stay float in a quantized model, the output head above all.

Decoding reads their weights as well, and a head in bfloat16 takes as long as many quantized
linears. Where a kernel reads such a weight faster than PyTorch, it takes the few rows of
activations it is for. The module stays an ``nn.Linear`` with its own parameters, whatever happens
to them later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantmill.kernels import KernelRegistry

__all__ = ["KeptLinear", "keep_fast", "plain_again"]


class KeptLinear(nn.Linear):
    """An ``nn.Linear`` whose product with few rows may be a kernel's; :func:`keep_fast` makes it.

    The kernel computes where the weight is still what it was chosen for, and nothing asks for
    gradients; ``nn.Linear`` computes everywhere else.
    """

    _kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    _most: int
    """Rows that the kernel takes."""
    _dtype: torch.dtype
    _device: str

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 as torch names it
        """As ``nn.Linear``: ``input [..., in]``, result ``[..., out]``."""
        weight, bias = self.weight, self.bias
        if (
            0 < input.numel() <= self._most * self.in_features
            # Not what another library puts in its place, such as a quantized tensor.
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
            and input.dtype == weight.dtype == self._dtype
            and input.device.type == weight.device.type == self._device
            and not (
                torch.is_grad_enabled()
                and (input.requires_grad or weight.requires_grad or _wants_gradient(bias))
            )
        ):
            return self._kernel(input, weight, bias)
        return nn.functional.linear(input, weight, bias)


def _wants_gradient(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def keep_fast(model: nn.Module, kernels: KernelRegistry) -> None:
    """Let the float linears of ``model`` use the kernel for few rows, where there is one."""
    for module in model.modules():
        if type(module) is not nn.Linear or "weight" not in module._parameters:
            continue
        weight = module.weight
        dtype, device = str(weight.dtype).removeprefix("torch."), weight.device.type
        choice = kernels.choose("linear", "tensor", {}, device=device, dtype=dtype, rows=1)
        if choice is None:
            continue
        module.__class__ = KeptLinear
        assert isinstance(module, KeptLinear)
        module._kernel = choice.load()
        module._most = choice.kernel.max_rows or sys.maxsize
        module._dtype, module._device = weight.dtype, device


def plain_again(model: nn.Module) -> None:
    """Undo :func:`keep_fast`."""
    for module in model.modules():
        if type(module) is KeptLinear:
            for name in ("_kernel", "_most", "_dtype", "_device"):
                del module.__dict__[name]
            module.__class__ = nn.Linear  # type: ignore[assignment]
