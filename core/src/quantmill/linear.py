"""The core's own linear: holds any form, computes with the chosen kernel or the reference.

Methods without a linear of their own use it. What lives in it is the form, or the live layout
that the chosen kernel prepared from it; the form itself is freed then. Its ``state_dict`` is what
the codec encodes, under the layout's own names, whatever a kernel did to the live copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.backend import Codec, LinearFactory
from quantmill.embedding import FormEmbedding, FormWeight
from quantmill.forms import Form
from quantmill.kernels import Choice, KernelRegistry, Prepared
from quantmill.targeting.types import Target

__all__ = ["DTYPES", "FormLinear", "FormLinearFactory", "live_of"]


Product = Callable[[Tensor, Tensor | None], Tensor]
"""``fn(x, bias)``: the product with one weight."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of activations for which kernels are chosen ahead."""


def live_of(kernels: KernelRegistry, form: Form, device: str, dtype: str) -> Form | Prepared:
    """The form as the best kernel for one row wants it: decoding is what a layout is made for.

    A form in a foreign layout becomes one of the core's kinds only if a kernel asks for that.
    """
    for kind, traits in form.facts():
        choice = kernels.choose("matmul", kind, traits, device=device, dtype=dtype, rows=1)
        if choice is not None:
            wanted = form if kind == form.kind else form.regular(kernels)
            return wanted if choice.kernel.prepare is None else Prepared.of(choice.kernel, wanted)
    return form


def _product_of(
    kernels: KernelRegistry, live: Form | Prepared, device: str, dtype: torch.dtype
) -> Product:
    """The product for activations of ``dtype``.

    Chosen and imported once per weight: a forward pass only looks it up, and a compiler has nothing
    to trace and to guard but the kernel.
    """
    kind = _skeleton_of(live).kind
    limits = {
        kernel.max_rows
        for kernel in kernels.kernels
        if kernel.operation == "matmul" and kernel.form == kind and kernel.max_rows
    }
    ways: list[tuple[int, Product]] = []
    for rows in (*sorted(limits), sys.maxsize):
        choice = _choice(kernels, "matmul", live, device, dtype, rows)
        bound = (
            _through_floats(kernels, live, device, dtype) if choice is None else choice.bind(live)
        )
        if bound is not None:
            ways.append((rows, bound))
    if not ways or ways[-1][0] < sys.maxsize:
        ways.append((sys.maxsize, _Reference(live)))
    return _ByRows(tuple(ways)) if len(ways) > 1 else ways[0][1]


@dataclass(frozen=True, slots=True)
class _ByRows:
    """Kernels by the most rows of activations that each is for, ascending; the last takes any."""

    ways: tuple[tuple[int, Product], ...]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        for most, product in self.ways[:-1]:
            if rows <= most:
                return product(x, bias)
        return self.ways[-1][1](x, bias)


@dataclass(frozen=True, slots=True)
class _Reference:
    """The form's own matmul, for rows that no kernel takes."""

    live: Form | Prepared

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _plain(self.live).matmul(x, bias)


Expander = Callable[[Form | Prepared, torch.dtype], Tensor]
"""``fn(live, dtype)``: the float weight."""


def _expander_of(
    kernels: KernelRegistry, live: Form | Prepared, device: str, dtype: torch.dtype
) -> Expander | None:
    """A kernel that dequantizes what lies in memory, or None."""
    choice = _choice(kernels, "dequantize", live, device, dtype)
    return None if choice is None else choice.load()


def _choice(
    kernels: KernelRegistry,
    operation: str,
    live: Form | Prepared,
    device: str,
    dtype: torch.dtype,
    rows: int | None = None,
) -> Choice | None:
    """The kernel of an operation for what lies in memory, as it lies there."""
    skeleton = _skeleton_of(live)
    return kernels.choose(
        operation,
        skeleton.kind,
        skeleton.traits(),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        layout=live.kernel.layout if isinstance(live, Prepared) else "",
    )


def _skeleton_of(live: Form | Prepared) -> Form:
    return live.skeleton if isinstance(live, Prepared) else live


def _device_of(live: Form | Prepared) -> torch.device:
    tensors = live.tensors if isinstance(live, Prepared) else live.tensors()
    return next(iter(tensors.values())).device


def _plain(live: Form | Prepared) -> Form:
    return live.restore() if isinstance(live, Prepared) else live


def _through_floats(
    kernels: KernelRegistry, live: Form | Prepared, device: str, dtype: torch.dtype
) -> Product | None:
    """Where nothing multiplies with a form: a kernel that dequantizes it, if there is one."""
    if isinstance(live, Prepared):
        return None
    expander = _expander_of(kernels, live, device, dtype)
    return None if expander is None else _Floats(expander, live)


@dataclass(frozen=True, slots=True)
class _Floats:
    """A matmul by a kernel that dequantizes."""

    dequantize: Expander
    form: Form

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.dequantize(self.form, x.dtype), bias)


class FormLinear(nn.Module):
    """``y = x @ W.T + bias`` with ``W`` held as a form, ``[out, in]``."""

    def __init__(
        self,
        form: Form,
        bias: Tensor | None,
        codec: Codec[Any],
        kernels: KernelRegistry,
        dtype: str = "bfloat16",
        *,
        stored: bool = True,
    ) -> None:
        """``dtype`` is the activations', by which a kernel is chosen. What is not ``stored`` is
        left out of the ``state_dict``: a tied weight is its owner's."""
        super().__init__()
        self.stored = stored
        self.out_features, self.in_features = form.shape[-2:]
        self._codec = codec
        self._kernels = kernels
        self._dtype = dtype
        self._hold(form)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _hold(self, form: Form) -> None:
        device = next(iter(form.tensors().values())).device.type
        self.adopt(live_of(self._kernels, form, device, self._dtype))

    def adopt(self, live: Form | Prepared) -> None:
        """Compute with this from now on: the same weight, wherever its tensors lie."""
        device = _device_of(live).type
        self._live = live
        self._products = {
            dtype: _product_of(self._kernels, live, device, dtype) for dtype in DTYPES
        }
        self._expanders = {
            dtype: _expander_of(self._kernels, live, device, dtype) for dtype in DTYPES
        }

    def keep(self, form: Form) -> None:
        """Hold the form as it is, for a module that computes with it in a way of its own: what it
        leaves to this class is the reference's."""
        self._live, self._products, self._expanders = form, {}, {}

    @property
    def live(self) -> Form | Prepared:
        """What is in memory: the form, or a kernel's layout made of it."""
        return self._live

    @property
    def kernels(self) -> KernelRegistry:
        """Where its kernels were chosen from."""
        return self._kernels

    @property
    def weight_only(self) -> bool:
        """Whether it computes ``x @ W.T + bias`` and nothing besides: inputs stay as they are."""
        return type(self).forward is FormLinear.forward

    @property
    def form(self) -> Form:
        """The form this module computes with."""
        return self.whole(self.plain())

    def plain(self) -> Form:
        """The form that kernels know."""
        return _plain(self._live)

    def whole(self, form: Form) -> Form:
        """The plain form with what kernels have no place for; nothing here. A method, for a
        compiler does not see through a property that asks its parent's."""
        return form

    @property
    def live_bytes(self) -> int:
        """Bytes of the weight as it lives here."""
        return self._live.nbytes

    @property
    def weight(self) -> Tensor:
        """The float weight ``[out, in]``, made where a value of it is used; shape, dtype and device
        cost nothing."""
        device = _device_of(self._live)
        shape, dtype = (self.out_features, self.in_features), getattr(torch, self._dtype)
        return FormWeight.of(lambda: self.form, shape, device, dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # Frameworks tie weights by assigning them; a tied form is shared already.
        if not isinstance(value, FormWeight):
            raise AttributeError("the weight is quantized: dequantize the model to assign one")

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias if self.bias is None else self.bias.to(x.dtype))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` by the kernel for so many rows; differentiable in ``x``."""
        if x.requires_grad and torch.is_grad_enabled():
            # Kernels compute no gradients.
            result: Tensor = _Differentiable.apply(x, self)  # type: ignore[no-untyped-call]
            return result if bias is None else result + bias
        kernel = self._products.get(x.dtype)
        return self.plain().matmul(x, bias) if kernel is None else kernel(x, bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The float weight ``[out, in]``, by a kernel where there is one."""
        kernel = self._expanders.get(dtype)
        return self.plain().dequantize(dtype) if kernel is None else kernel(self._live, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> FormLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def move(tensor: Tensor) -> Tensor:
            # .to(dtype) must not touch codes and scales: only follow a change of device.
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._hold(self.form.map_tensors(move))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.stored:
            for name, tensor in self._codec.encode(self.form).items():
                destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def extra_repr(self) -> str:
        live = self._live
        skeleton = _skeleton_of(live)
        layout = f", layout={live.kernel.layout}" if isinstance(live, Prepared) else ""
        return f"in={self.in_features}, out={self.out_features}, form={skeleton.kind}{layout}"


class _Differentiable(torch.autograd.Function):
    """``x @ W.T`` whose backward pass dequantizes again in place of keeping ``W``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: FormLinear) -> Tensor:
        ctx.module = module
        return module.product(x)  # Nobody asks for gradients in here.

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.module.dequantized(grad.dtype), None


class FormLinearFactory(LinearFactory[Any]):
    """Makes :class:`FormLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return FormLinear(form, bias, self.codec, self.kernels, self.dtype)

    def form_of(self, module: nn.Module) -> Form | None:
        return module.form if isinstance(module, FormLinear | FormEmbedding) else None

    def resident_bytes(self, form: Form) -> int:
        return live_of(self.kernels, form, self.device, self.dtype).nbytes

    def building_bytes(self, form: Form) -> int:
        live = live_of(self.kernels, form, self.device, self.dtype)
        if not isinstance(live, Prepared):
            return 0
        # A kernel's layout is made of the core's form, and that of a foreign one.
        regular = live.skeleton.nbytes if live.skeleton.kind != form.kind else 0
        return form.nbytes + regular

    def forward_bytes(self, form: Form, dtype: torch.dtype) -> int:
        live = live_of(self.kernels, form, self.device, self.dtype)
        kernel = _choice(self.kernels, "matmul", live, self.device, dtype, sys.maxsize)
        return super().forward_bytes(form, dtype) if kernel is None else 0

    def backward_bytes(self, form: Form, dtype: torch.dtype) -> int:
        live = live_of(self.kernels, form, self.device, self.dtype)
        weight = super().backward_bytes(form, dtype)
        if _expander_of(self.kernels, live, self.device, dtype) is not None:
            return weight
        # The reference computes in float32: codes and their products with the scales.
        rows, columns = form.shape[-2:]
        rounded = 0 if dtype == torch.float32 else weight
        return rounded + 2 * 4 * int(rows * columns)
