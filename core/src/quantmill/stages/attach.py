"""Forward-time dequantization for targets that no linear class covers, and its removal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantmill.backend import Codec
from quantmill.forms import Form

__all__ = ["attach_form", "detach_forms"]


class _FromForm(nn.Module):
    """A parametrization whose value is a form, dequantized at each use."""

    def __init__(self, form: Form, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self.form = form
        self.dtype = dtype
        self.transposed = transposed

    def forward(self, placeholder: Tensor) -> Tensor:
        value = self.form.dequantize(self.dtype)
        return value.transpose(-1, -2) if self.transposed else value

    def _apply(self, fn: Any, recurse: bool = True) -> _FromForm:
        # Codes and scales follow a change of device and never one of dtype.
        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.form = self.form.map_tensors(move)
        return self


def attach_form(
    module: nn.Module,
    name: str,
    form: Form,
    dtype: torch.dtype,
    *,
    codec: Codec[Any] | None = None,
    transposed: bool = False,
) -> None:
    """Let ``module.<name>`` give the dequantized form at each forward.

    For targets that no linear class covers: the float weight exists only while it is used.
    ``state_dict`` gives what ``codec`` encodes; for a parameter that is not called ``weight`` its
    name takes that word's place. ``transposed`` parameters are the form's transpose. Undo with
    :func:`detach_forms`.
    """
    original = getattr(module, name)
    placeholder = torch.empty(0, dtype=dtype, device=original.device)
    module._parameters.pop(name, None)
    module.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))
    attached = _FromForm(form, dtype, transposed)
    parametrize.register_parametrization(module, name, attached, unsafe=True)

    def encode(owner: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = f"{prefix}parametrizations.{name}.original"
        if state.pop(key, None) is None or codec is None:
            return
        for local, tensor in codec.encode(attached.form).items():
            head, dot, tail = local.partition(".")
            state[prefix + (name if head == "weight" else head) + dot + tail] = tensor

    hooks = getattr(module, "_quantmill_hooks", {})
    hooks[name] = module.register_state_dict_post_hook(encode)  # type: ignore[no-untyped-call]
    module._quantmill_hooks = hooks  # type: ignore[assignment]


def detach_forms(module: nn.Module) -> int:
    """Turn every attached form below ``module`` back into a plain float parameter; their count."""
    count = 0
    for part in list(module.modules()):
        if not parametrize.is_parametrized(part):
            continue
        for name in list(part.parametrizations):  # type: ignore[arg-type]
            chain: Any = part.parametrizations[name]  # type: ignore[index]
            if not any(isinstance(item, _FromForm) for item in chain):
                continue
            value = getattr(part, name).detach().clone(memory_format=torch.contiguous_format)
            parametrize.remove_parametrizations(part, name, leave_parametrized=False)
            part._parameters[name] = nn.Parameter(value, requires_grad=False)
            part._quantmill_hooks.pop(name).remove()  # type: ignore[operator, union-attr]
            count += 1
    return count
