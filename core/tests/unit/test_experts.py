"""Stacked experts taken apart and put together again; what each of them computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.experts import (
    LinearExperts,
    locate,
    matrix_modules,
    restack,
    stack_of,
    unstack,
    unstack_planned,
)
from quantmill.modules import ModuleArchitecture

EXPERTS, HIDDEN, WIDTH = 3, 8, 6


class Experts(nn.Module):
    """Stacks as transformers' models have them, with a forward pass of the plainest kind."""

    def __init__(self, *, gate: bool, transposed: bool, concatenated: bool, bias: bool) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = EXPERTS, gate, bias
        self.is_transposed, self.is_concatenated = transposed, concatenated
        first = "gate_up_proj" if gate else "up_proj"
        rows = 2 * WIDTH if gate else WIDTH
        for name, out, inner in ((first, rows, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            shape = (EXPERTS, inner, out) if transposed else (EXPERTS, out, inner)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, out)))
        self.first, self.act_fn = first, nn.SiLU()

    def _apply_gate(self, both: Tensor) -> Tensor:
        if self.is_concatenated:
            gate, up = both.chunk(2, dim=-1)
        else:
            gate, up = both[..., ::2], both[..., 1::2]
        return torch.nn.functional.silu(gate) * up

    def product(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = self.get_parameter(name)[expert]
        made = x @ (weight if self.is_transposed else weight.t())
        return made + self.get_parameter(f"{name}_bias")[expert] if self.has_bias else made

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token in range(x.shape[0]):
            total = torch.zeros(HIDDEN)
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                if expert < EXPERTS:
                    both = self.product(self.first, expert, x[token])
                    inner = self._apply_gate(both) if self.has_gate else self.act_fn(both)
                    total = total + weight * self.product("down_proj", expert, inner)
            rows.append(total)
        return torch.stack(rows)


KINDS = {
    "mixtral": {"gate": True, "transposed": False, "concatenated": True, "bias": False},
    "gpt-oss": {"gate": True, "transposed": True, "concatenated": False, "bias": True},
    "aria": {"gate": True, "transposed": True, "concatenated": True, "bias": False},
    "nemotron": {"gate": False, "transposed": False, "concatenated": True, "bias": False},
}


def experts(kind: str) -> Any:
    torch.manual_seed(0)
    return Experts(**KINDS[kind])


def fill(module: nn.Module, stacked: nn.Module, owner: str = "") -> None:
    """Give an unstacked module's linears the weights of a stacked one."""
    stack = stack_of(stacked)
    assert stack is not None
    for info in matrix_modules(owner, stack):
        linear = module.get_submodule(info.name)
        for local, part in info.parts.items():
            value = part.of(stacked.get_parameter(part.parameter).detach()).clone()
            linear.register_parameter(local, nn.Parameter(value))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_linears_compute_what_the_stacks_do(kind: str) -> None:
    stacked, module = experts(kind), experts(kind)
    stack = stack_of(module)
    assert stack is not None
    unstack(module, stack)
    fill(module, stacked)
    x = torch.randn(7, HIDDEN)
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 3], [3, 3], [2, 0], [0, 1]])
    weights = torch.rand(7, 2)
    assert torch.allclose(module(x, index, weights), stacked(x, index, weights), atol=1e-5)
    assert isinstance(module, Experts), "it is still of its class"
    assert module.state_dict().keys().isdisjoint(stack.parameters)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_restacking_is_the_exact_inverse(kind: str) -> None:
    stacked, module = experts(kind), experts(kind)
    stack = stack_of(module)
    assert stack is not None
    unstack(module, stack)
    fill(module, stacked)
    restack(module)
    assert type(module) is Experts
    state = module.state_dict()
    assert state.keys() == stacked.state_dict().keys()
    for key, tensor in stacked.state_dict().items():
        assert torch.equal(state[key], tensor), key
    unstack(module, stack)
    assert isinstance(module, LinearExperts), "and again"


def test_what_is_no_stack_is_left_alone() -> None:
    assert stack_of(nn.Linear(4, 4)) is None
    other = experts("mixtral")
    other.num_experts = 4
    assert stack_of(other) is None, "its parameters have another number of experts"
    assert stack_of(experts("mixtral"), {"gate_up_proj": ["w13"]}) is None


def test_names_and_rows_of_matrices() -> None:
    stack = stack_of(experts("gpt-oss"), {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]})
    assert stack is not None
    infos = list(matrix_modules("model.layers.4.mlp.experts", stack))
    assert [item.name.partition("experts.")[2] for item in infos[:3]] == ["0.w1", "0.w3", "0.w2"]
    assert {(item.role, item.layer, item.kind) for item in infos} == {("expert", 4, "linear")}
    assert infos[1].parts["weight"].rows == (1, 2 * WIDTH, 2)
    assert infos[1].parameters["weight"].shape == (WIDTH, HIDDEN)
    assert infos[2].parameters["bias"].shape == (HIDDEN,)


def test_a_plan_unstacks_only_what_it_quantizes() -> None:
    model = nn.Module()
    model.add_module("a", experts("mixtral"))
    model.add_module("b", experts("mixtral"))
    modules = ModuleArchitecture(model).modules
    place = locate(model, modules[0], "weight")
    assert place.module is model.a and place.local == "gate_up_proj" and place.part is not None
    for _ in range(2):
        unstack_planned(model, modules, {"b.1.up_proj"})
    assert not isinstance(model.a, LinearExperts) and isinstance(model.b, LinearExperts)
    other = next(item for item in modules if item.name == "b.2.down_proj")
    assert locate(model, other, "weight").module is model.b.get_submodule("2.down_proj")


def test_no_token_at_all() -> None:
    module = experts("mixtral")
    stack = stack_of(module)
    assert stack is not None
    stacked = experts("mixtral")
    unstack(module, stack)
    fill(module, stacked)
    empty = module(torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert empty.shape == (0, HIDDEN)
