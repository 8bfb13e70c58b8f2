"""One product for a projection of all experts: a call takes the place of one per expert.

The forms of the experts stay what they are, one per linear. What moves is the live copy: prepared
tensors of equal shape lie one after the other in a *bank*, and each linear holds its part as a
view. So a kernel needs one address for all of them, a compiled graph one argument, and no expert
costs a step of the interpreter. Where no kernel multiplies with a bank, the linears are called one
by one: that is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.forms import Form
from quantmill.kernels import Choice, KernelRegistry, Prepared
from quantmill.linear import DTYPES, FormLinear, live_of

__all__ = ["Bank", "groups"]

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``fn(x, ends, bias)``: see ``grouped_matmul`` in :mod:`quantmill.kernels`."""


def groups(kernels: KernelRegistry, form: Form, device: str, dtype: str) -> bool:
    """Whether a kernel multiplies with many forms like this one at once."""
    live = live_of(kernels, form.to("meta"), device, dtype)
    return isinstance(live, Prepared) and _choose(kernels, live, device, dtype) is not None


def _choose(kernels: KernelRegistry, live: Prepared, device: str, dtype: str) -> Choice | None:
    skeleton = live.skeleton
    return kernels.choose(
        "grouped_matmul",
        skeleton.kind,
        skeleton.traits(),
        device=device,
        dtype=dtype,
        layout=live.kernel.layout,
    )


@dataclass(slots=True, eq=False)
class Bank:
    """The linears of one projection, expert by expert, with their weights in one place."""

    leaf: str
    """Name of the linears in their experts."""
    members: tuple[tuple[dict[str, nn.Module | None], FormLinear, Prepared], ...]
    """The modules of each expert, its linear, and what that held when the bank was made."""
    bias: Tensor | None
    """``[experts, out]``."""
    products: dict[torch.dtype, Product]

    @classmethod
    def of(cls, experts: Sequence[nn.Module], leaf: str) -> Bank | None:
        """A bank of the linears of that name, or None where they have no product in common.

        Their live tensors are copied into the bank one by one, and let go.
        """
        linears = [expert._modules[leaf] for expert in experts]
        found = [linear for linear in linears if isinstance(linear, FormLinear)]
        if len(found) != len(linears) or not all(map(_untouched, found)):
            return None
        first = found[0].live
        if not isinstance(first, Prepared) or not all(_alike(found[0], item) for item in found):
            return None
        device = next(iter(first.tensors.values())).device
        kernels = found[0].kernels
        names = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
        choices = {
            dtype: _choose(kernels, first, device.type, name) for dtype, name in names.items()
        }
        if not any(choices.values()):
            return None
        tensors = {
            name: torch.empty((len(found), *like.shape), dtype=like.dtype, device=like.device)
            for name, like in first.tensors.items()
        }
        members = []
        for index, (expert, linear) in enumerate(zip(experts, found, strict=True)):
            live = linear.live
            assert isinstance(live, Prepared)
            views = {name: bank[index] for name, bank in tensors.items()}
            for name, view in views.items():
                view.copy_(live.tensors[name])
            moved = Prepared(live.kernel, live.skeleton, views)
            linear.adopt(moved)
            members.append((expert._modules, linear, moved))
        stacked = Prepared(first.kernel, first.skeleton, tensors)
        products: dict[torch.dtype, Product] = {}
        for dtype, choice in choices.items():
            product = None if choice is None else choice.bind(stacked)
            if product is not None:
                products[dtype] = product
        return cls(leaf, tuple(members), _bias_of(found), products) if products else None

    def serves(self) -> bool:
        """Whether it still computes what a call of each linear would. Asked before each product:
        written for few steps."""
        leaf = self.leaf
        for modules, linear, live in self.members:
            if (
                modules[leaf] is not linear
                or linear._live is not live
                or linear._forward_hooks
                or linear._forward_pre_hooks
                or "forward" in linear.__dict__
            ):
                return False
        return True

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:
        """``x @ W.T + bias`` with each row's own expert; rows beyond the last are zeros."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.products[x.dtype](x, ends, bias)


def _untouched(linear: FormLinear) -> bool:
    """Nobody put anything around its forward, and that is the product alone."""
    return (
        linear.weight_only
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and "forward" not in linear.__dict__
    )


def _alike(one: FormLinear, two: FormLinear) -> bool:
    """Whether one kernel, with the same constants, is right for both."""
    a, b = one.live, two.live
    if not (isinstance(a, Prepared) and isinstance(b, Prepared) and a.kernel == b.kernel):
        return False
    if a.skeleton.shape != b.skeleton.shape or a.skeleton.traits() != b.skeleton.traits():
        return False
    if (one.bias is None) != (two.bias is None) or a.tensors.keys() != b.tensors.keys():
        return False
    return all(_same(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def _same(one: Tensor, two: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)


def _bias_of(linears: Sequence[FormLinear]) -> Tensor | None:
    """All biases in one tensor, of which each linear's is a view from now on."""
    if linears[0].bias is None:
        return None
    stacked = torch.stack([linear.bias.detach() for linear in linears if linear.bias is not None])
    for linear, row in zip(linears, stacked, strict=True):
        kept: Any = linear.bias
        kept.data = row
    return stacked
