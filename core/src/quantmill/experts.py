"""Experts of a mixture: each matrix of a stacked parameter as a linear of its own.

A module that stacks its experts holds ``gate_up_proj [experts, 2 * width, hidden]`` (or ``up_proj``
without a gate) and ``down_proj [experts, hidden, width]``, perhaps transposed, perhaps with biases
``[experts, out]``. Files, and the peers' formats, have one matrix per expert and projection. So has
quantmill: architectures list ``experts.3.gate_proj`` among their modules, and where one of them is
quantized :func:`unstack` gives the module such linears in place of its stacks. It computes with
the experts that tokens are routed to, and with no other: by one product for a projection of all
experts where a kernel has it (:mod:`quantmill.grouped`), one by one otherwise. :func:`restack` is
the inverse of :func:`unstack`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.grouped import Bank
from quantmill.targeting.roles import guess_layer
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Part

__all__ = [
    "LinearExperts",
    "Matrix",
    "Place",
    "Stack",
    "locate",
    "matrix_modules",
    "restack",
    "stack_of",
    "unstack",
    "unstack_planned",
]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One of the matrices that each expert has."""

    leaf: str
    """Its name in the expert: ``gate_proj``."""
    parameter: str
    """Local name of the stacked parameter that holds it."""
    rows: tuple[int, int, int]
    """Start, stop and step of its output features in the parameter."""
    in_features: int
    transposed: bool
    """The parameter is ``[experts, in, out]``."""
    bias: str | None = None
    """Local name of the stacked biases ``[experts, out]``."""

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return len(range(*self.rows))

    def part(self, module: str, expert: int) -> Part:
        """Where an expert's matrix lies, ``module`` being the path of the stacking module."""
        return Part(module, self.parameter, expert, self.rows, self.transposed)

    def bias_part(self, module: str, expert: int) -> Part | None:
        """Where its bias lies."""
        return None if self.bias is None else Part(module, self.bias, expert, self.rows)


@dataclass(frozen=True, slots=True)
class Stack:
    """How a module stacks its experts."""

    experts: int
    matrices: tuple[Matrix, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Local names of everything stacked, biases too."""
        names = [name for item in self.matrices for name in (item.parameter, item.bias)]
        return tuple(dict.fromkeys(name for name in names if name is not None))


def stack_of(module: nn.Module, leaves: Mapping[str, Sequence[str]] | None = None) -> Stack | None:
    """How ``module`` stacks its experts, or None when it is no such module.

    A stacking module says so itself, in the attributes that transformers gives the experts of its
    models: ``num_experts``, ``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``
    (gate before up, or the two interleaved), and ``_apply_gate`` or ``act_fn``.

    Args:
        module: any module.
        leaves: names of a parameter's matrices; by default those of its own name, taken apart.
    """
    count = getattr(module, "num_experts", None)
    gated = getattr(module, "has_gate", None)
    if not isinstance(count, int) or not isinstance(gated, bool):
        return None
    flipped = bool(getattr(module, "is_transposed", False))
    biased = bool(getattr(module, "has_bias", False))
    matrices = []
    for parameter in ("gate_up_proj" if gated else "up_proj", "down_proj"):
        tensor = module._parameters.get(parameter)
        if tensor is None or tensor.ndim != 3 or tensor.shape[0] != count or 0 in tensor.shape:
            return None
        bias = f"{parameter}_bias" if biased else None
        if bias is not None and bias not in module._parameters:
            return None
        rows, columns = (tensor.shape[2], tensor.shape[1]) if flipped else tensor.shape[1:]
        halves = 2 if parameter == "gate_up_proj" else 1
        names = (leaves or {}).get(parameter) or _default_leaves(parameter)
        if rows % halves or len(names) != halves:
            return None
        size = rows // halves
        concatenated = bool(getattr(module, "is_concatenated", True))
        for index, leaf in enumerate(names):
            span = (index * size, (index + 1) * size, 1) if concatenated else (index, rows, halves)
            matrices.append(Matrix(leaf, parameter, span, columns, flipped, bias))
    return Stack(count, tuple(matrices))


def _default_leaves(parameter: str) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)


def matrix_modules(owner: str, stack: Stack, keep_float: bool = False) -> Iterator[ModuleInfo]:
    """Each matrix of each expert as a module, expert by expert, with parameters that have a part
    and neither dtype nor source yet; ``owner`` is the path of the stacking module."""
    layer = guess_layer(owner)
    for expert in range(stack.experts):
        for matrix in stack.matrices:
            name = f"{owner}.{expert}.{matrix.leaf}".removeprefix(".")
            parts = {"weight": matrix.part(owner, expert)}
            shapes: dict[str, tuple[int, ...]] = {
                "weight": (matrix.out_features, matrix.in_features)
            }
            bias = matrix.bias_part(owner, expert)
            if bias is not None:
                parts["bias"], shapes["bias"] = bias, (matrix.out_features,)
            parameters = {
                local: ParameterInfo(f"{name}.{local}", shape, "F32", part=parts[local])
                for local, shape in shapes.items()
            }
            yield ModuleInfo(
                name,
                "linear",
                "Linear",
                parameters,
                role="expert",
                layer=layer,
                keep_float=keep_float,
                parts=parts,
            )


class LinearExperts(nn.Module):
    """Mixed into the class of a module whose experts are linears now. See :func:`unstack`."""

    _stack: Stack
    _stacked_class: type[nn.Module]
    _banks: tuple[Bank, ...] = ()
    """A bank for each matrix of an expert, or none at all."""

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: ``[tokens, hidden]``.
            args: indices of the chosen experts ``[tokens, k]`` and their weights ``[tokens, k]``;
                an index beyond the last expert stands for none.
            kwargs: the same by any name, in that order.
        """
        index, weights = (*args, *kwargs.values())
        tokens, chosen = index.shape
        ordered, order = torch.sort(index.reshape(-1), stable=True)
        experts = torch.arange(self._stack.experts, device=index.device, dtype=index.dtype)
        ends = torch.searchsorted(ordered, experts, right=True)
        rows = hidden_states[order // chosen]
        run = self._at_once if self._grouped(rows) else self._in_turn
        by_expert = run(rows, ends)
        outputs = torch.empty_like(by_expert).index_copy_(0, order, by_expert)
        weighted = outputs * weights.reshape(-1, 1)
        summed = weighted.view(tokens, chosen, weighted.shape[-1]).sum(dim=1)
        return summed.to(hidden_states.dtype)

    def _grouped(self, rows: Tensor) -> bool:
        """Whether the banks serve: kernels compute no gradients, and what somebody put in place of
        a linear, or around it, has to be called."""
        if not self._banks or (rows.requires_grad and torch.is_grad_enabled()):
            return False
        if any(rows.dtype not in bank.products for bank in self._banks):
            return False
        serve: bool = _banks_serve(self)
        return serve

    def _at_once(self, rows: Tensor, ends: Tensor) -> Tensor:
        *first, last = self._banks
        hidden = self._between([bank(rows, ends) for bank in first])
        return self._after(last(hidden, ends))

    def _in_turn(self, rows: Tensor, ends: Tensor) -> Tensor:
        outputs = []
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                outputs.append(self.run_expert(expert, rows[start:end]))
                start = end
        if start < rows.shape[0]:
            outputs.append(torch.zeros_like(rows[start:]))
        return torch.cat(outputs) if outputs else rows

    def run_expert(self, expert: int, rows: Tensor) -> Tensor:
        """What one expert makes of ``rows [n, hidden]``, unweighted."""
        own: Any = self._modules[str(expert)]
        *first, last = self._stack.matrices
        hidden = self._between([own._modules[item.leaf](rows) for item in first])
        return self._after(own._modules[last.leaf](hidden))

    def _between(self, parts: list[Tensor]) -> Tensor:
        """The last projection's input, from the outputs of those before."""
        this: Any = self
        if len(parts) == 1:
            alone: Tensor = this.act_fn(parts[0])
            return alone
        concatenated = self._stack.matrices[0].rows[2] == 1
        joined = torch.cat(parts, -1) if concatenated else torch.stack(parts, -1).flatten(-2)
        return _apply_gate(this, joined)

    def _after(self, output: Tensor) -> Tensor:
        this: Any = self
        if getattr(this, "has_post_expert_norm", False):
            normed: Tensor = this.post_expert_norm(output)
            return normed
        return output

    def group(self) -> bool:
        """Let all experts compute at once from now on, where a kernel can; whether one does."""
        self._banks = ()
        banks: list[Bank] = []
        experts = [self.get_submodule(str(index)) for index in range(self._stack.experts)]
        for matrix in self._stack.matrices:
            bank = Bank.of(experts, matrix.leaf)
            if bank is None:
                return False
            banks.append(bank)
        self._banks = tuple(banks)
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> LinearExperts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._banks:
            self.group()
        return self


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _banks_serve(module: LinearExperts) -> bool:
    return all(bank.serves() for bank in module._banks)


def _apply_gate(module: Any, gate_up: Tensor) -> Tensor:
    own = getattr(module, "_apply_gate", None)
    if own is not None:
        made: Tensor = own(gate_up)
        return made
    gate, up = gate_up.chunk(2, dim=-1)
    plain: Tensor = module.act_fn(gate) * up
    return plain


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(stacked: type[nn.Module]) -> type[nn.Module]:
    if stacked not in _CLASSES:
        name = f"{stacked.__name__}OfLinears"
        _CLASSES[stacked] = type(name, (LinearExperts, stacked), {"__doc__": stacked.__doc__})
    return _CLASSES[stacked]


def unstack(module: nn.Module, stack: Stack) -> None:
    """Give ``module`` linears on the meta device in place of its stacked parameters.

    They are its grandchildren, ``3.gate_proj``; whatever else the module has stays.
    """
    dtype = module.get_parameter(stack.matrices[0].parameter).dtype
    for name in stack.parameters:
        del module._parameters[name]
    for expert in range(stack.experts):
        own = nn.Module()
        for item in stack.matrices:
            linear = nn.Linear(
                item.in_features,
                item.out_features,
                bias=item.bias is not None,
                device="meta",
                dtype=dtype,
            )
            own.add_module(item.leaf, linear.requires_grad_(False))
        module.add_module(str(expert), own.train(module.training))
    changed: Any = module
    changed._stack, changed._stacked_class = stack, type(module)
    module.__class__ = _class_of(type(module))


def restack(module: nn.Module) -> None:
    """Put the linears of an unstacked module, all of them float, back into its stacks."""
    changed: Any = module
    stack: Stack = changed._stack
    for item in stack.matrices:
        for name, local in ((item.parameter, "weight"), (item.bias, "bias")):
            if name is None:
                continue
            for expert in range(stack.experts):
                linear: Any = module.get_submodule(f"{expert}.{item.leaf}")
                value = getattr(linear, local).detach()
                if name not in module._parameters:
                    module._parameters[name] = _empty_stack(stack, name, value)
                part = Part("", name, expert, item.rows, item.transposed and local == "weight")
                part.of(module._parameters[name].data).copy_(value)  # type: ignore[union-attr]
    for expert in range(stack.experts):
        del module._modules[str(expert)]
    module.__class__ = changed._stacked_class
    del changed._stack, changed._stacked_class
    changed.__dict__.pop("_banks", None)


def _empty_stack(stack: Stack, name: str, like: Tensor) -> nn.Parameter:
    of_it = [item for item in stack.matrices if name in (item.parameter, item.bias)]
    rows = sum(item.out_features for item in of_it)
    shape: tuple[int, ...] = (stack.experts, rows)
    if name == of_it[0].parameter:
        columns = of_it[0].in_features
        shape = (shape[0], columns, rows) if of_it[0].transposed else (*shape, columns)
    value = torch.empty(shape, dtype=like.dtype, device=like.device)
    return nn.Parameter(value, requires_grad=False)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a live model keeps a tensor: a parameter or buffer, or a part of a stacked one."""

    module: nn.Module
    local: str
    part: Part | None = None


def locate(model: nn.Module, module: ModuleInfo, local: str) -> Place:
    """The place of a module's tensor, whether or not its experts are unstacked."""
    part = module.parts.get(local)
    if part is not None:
        owner = model.get_submodule(part.module)
        if not isinstance(owner, LinearExperts):
            return Place(owner, part.parameter, part)
    return Place(model.get_submodule(module.name) if module.name else model, local)


def unstack_planned(
    model: nn.Module, modules: Iterable[ModuleInfo], quantized: Collection[str]
) -> None:
    """Unstack every module one of whose matrices (by name) is to be quantized."""
    leaves: dict[str, dict[str, list[str]]] = {}
    wanted = set()
    for info in modules:
        part = info.parts.get("weight")
        if part is None:
            continue
        of_owner = leaves.setdefault(part.module, {}).setdefault(part.parameter, [])
        leaf = info.name.rpartition(".")[2]
        if leaf not in of_owner:
            of_owner.append(leaf)
        if info.name in quantized:
            wanted.add(part.module)
    for name in sorted(wanted):
        owner = model.get_submodule(name)
        if isinstance(owner, LinearExperts):
            continue
        stack = stack_of(owner, leaves[name])
        assert stack is not None
        unstack(owner, stack)
