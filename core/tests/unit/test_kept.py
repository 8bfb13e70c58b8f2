"""Float linears of a quantized model: a kernel for few rows, and ``nn.Linear`` everywhere else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.kept import KeptLinear, keep_fast, plain_again
from quantmill.kernels import KernelRegistry
from quantmill.registrations import Kernel

CALLS: list[tuple[int, ...]] = []


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A kernel whose results tell that it was it."""
    CALLS.append(tuple(x.shape))
    return 2 * nn.functional.linear(x, weight, bias)


KERNEL = Kernel(
    name="doubled",
    operation="linear",
    form="tensor",
    implementation=f"{__name__}:doubled",
    dtypes=("bfloat16",),
    max_rows=4,
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4, bias=False)).bfloat16()
    made.requires_grad_(False)
    CALLS.clear()
    keep_fast(made, KernelRegistry([KERNEL], environment=False))
    return made


def plain(model: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, model[0].weight, model[0].bias)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, 8).bfloat16()


def test_few_rows_go_to_the_kernel_and_no_others(model: Any) -> None:
    assert type(model[0]) is KeptLinear and isinstance(model[2], nn.Linear)
    for shape, taken in (((1,), True), ((2, 2), True), ((), True), ((5,), False), ((0,), False)):
        value = x(*shape)
        assert torch.equal(model[0](value), plain(model, value) * (2 if taken else 1))


def test_nothing_but_the_weight_it_was_chosen_for_goes_there(model: Any) -> None:
    one = x(1)
    wide = copy.deepcopy(model).float()
    assert torch.equal(wide[0](one.float()), plain(wide, one.float()))
    turned = copy.deepcopy(model)
    turned[0].weight = nn.Parameter(turned[0].weight.t().contiguous().t(), requires_grad=False)
    assert torch.equal(turned[0](one), plain(turned, one))

    class Other(Tensor):
        pass

    odd = copy.deepcopy(model)
    odd[0].weight = nn.Parameter(odd[0].weight.as_subclass(Other), requires_grad=False)
    assert torch.equal(odd[0](one).as_subclass(Tensor), plain(odd, one).as_subclass(Tensor))
    assert not CALLS


def test_gradients_are_torchs(model: Any) -> None:
    one = x(1).requires_grad_()
    model[0](one).sum().backward()
    assert one.grad is not None and not CALLS
    model[0].bias.requires_grad_(True)
    assert model[0](x(1)).requires_grad and not CALLS
    with torch.no_grad():
        model[0](one)
    assert len(CALLS) == 1


def test_it_can_be_copied_pickled_saved_and_compiled(model: Any) -> None:
    one = x(1)
    answer = model(one)
    assert torch.equal(copy.deepcopy(model)(one), answer)
    assert torch.equal(pickle.loads(pickle.dumps(model))(one), answer)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight"}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(one), answer)
    assert torch.equal(compiled(x(6)) * 0, model(x(6)) * 0)


def test_it_becomes_a_plain_linear_again(model: Any) -> None:
    before = dict(model[0].__dict__)
    plain_again(model)
    assert type(model[0]) is nn.Linear
    assert set(before) - set(model[0].__dict__) == {"_kernel", "_most", "_dtype", "_device"}
    model(x(1))
    assert not CALLS


def test_without_a_kernel_nothing_changes() -> None:
    made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    keep_fast(made, KernelRegistry([], environment=False))
    assert [type(module) for module in made] == [nn.Linear] * 2
    # float32 has no kernel; a derived class may compute something else.
    derived = type("Derived", (nn.Linear,), {})
    mixed = nn.Sequential(nn.Linear(8, 8), derived(8, 8).bfloat16())
    keep_fast(mixed, KernelRegistry([KERNEL], environment=False))
    assert [type(module) for module in mixed] == [nn.Linear, derived]
