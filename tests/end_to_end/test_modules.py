"""Plain modules of any framework: quantized in place, calibrated or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantmill
from quantmill.findings import QuantmillError

pytest.importorskip("quantmill_bnb")
pytest.importorskip("quantmill_gptq")
pytest.importorskip("quantmill_awq")


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        result: Tensor = x + gain * self.down(torch.relu(self.up(self.norm(x))))
        return result


class Net(nn.Module):
    """Nothing that a framework would know, and keyword arguments."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Linear(32, width)
        self.stack = nn.ModuleList(Layer(width) for _ in range(3))
        self.leave = nn.Linear(width, 32)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        x = self.enter(x)
        for layer in self.stack:
            x = layer(x, gain)
        result: Tensor = self.leave(x)
        return result


@pytest.fixture
def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 32, generator=generator)
    return torch.randn(64, 6, generator=generator) @ mix


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    "method", ["bnb-nf4", "bnb-int8", "gptq-4:group_size=32", "awq-4:group_size=32"]
)
def test_a_plain_module_is_quantized_in_place(method: str, inputs: Tensor) -> None:
    exact = _net()(inputs).detach()
    net = _net()
    calls: Any = [{"x": part, "gain": 1.0} for part in inputs.split(16)]
    data = {} if method.startswith("bnb") else {"calibration": calls}
    made = quantmill.quantize_model(net, method, skip=["enter"], **data)
    assert made is net and net.training
    assert type(net.enter) is nn.Linear
    assert type(net.stack[1].up) is not nn.Linear
    error = (net(inputs) - exact).norm() / exact.norm()
    assert 0 < error < 0.15


def test_a_sequential_is_its_own_list_of_blocks(inputs: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)
    )
    exact = net(inputs).detach()
    quantmill.quantize_model(net, "gptq-4:group_size=32", calibration=list(inputs.split(16)))
    assert sum(type(part).__name__ == "QuantLinear" for part in net) == 3
    assert (net(inputs) - exact).norm() / exact.norm() < 0.15


def test_blocks_that_share_a_module_are_refused(inputs: Tensor) -> None:
    net = _net()
    net.stack[2].up = net.stack[0].up
    with pytest.raises(QuantmillError, match="shares a Linear with block 0") as caught:
        quantmill.quantize_model(net, "gptq-4:group_size=32", calibration=[inputs])
    assert caught.value.findings[0].code == "QM-CALIB-021"
    assert type(net.stack[0].up) is nn.Linear


def test_calibration_beats_rounding_on_a_plain_module(inputs: Tensor) -> None:
    exact = _net()(inputs).detach()
    errors = []
    for damp in (0.05, 0.99):
        net = quantmill.quantize_model(
            _net(), f"gptq-3:group_size=32,damp_percent={damp}", calibration=[inputs]
        )
        errors.append((net(inputs) - exact).norm())
    assert errors[0] < errors[1]


def test_shared_weights_stay_shared(inputs: Tensor) -> None:
    net = _net()
    net.leave = nn.Linear(32, 64)
    net.leave.weight = net.enter.weight
    quantmill.quantize_model(net, "bnb-nf4")
    assert net.leave.weight is net.enter.weight
    assert type(net.enter) is nn.Linear


def test_mistakes_are_found_before_the_module_is_touched(inputs: Tensor) -> None:
    net = _net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for method, options in (
        ("gptq-4:group_size=32", {}),
        ("bnb-nf4", {"skip": ["nobody"]}),
        ("bnb-nf5", {}),
    ):
        with pytest.raises(QuantmillError):
            quantmill.quantize_model(net, method, **options)  # type: ignore[arg-type]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
