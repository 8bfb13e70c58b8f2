"""Batches that pause at linears of a block: order, modes, errors, and that none is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.calibration.staged import run_staged


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ended = 0

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        try:
            x = x if skip else self.first(x)
            with torch.autocast("cpu", enabled=False):
                return self.second(x)
        finally:
            self.ended += 1


def call(block: Block, value: float, skip: bool = False) -> Callable[[], Any]:
    return lambda: block(torch.full((2, 4), float(value)), skip)


def test_each_linear_gets_what_the_one_before_it_became() -> None:
    block = Block()
    log: list[tuple[str, int]] = []
    inputs: list[Tensor] = []

    def second(x: Tensor, number: int) -> None:
        log.append(("second", number))
        inputs.append(x)

    def after(stop: int) -> None:
        log.append(("after", stop))
        if stop == 0:
            with torch.no_grad():
                block.first.weight.zero_()
                block.first.bias.fill_(7)

    stops = [(block.first, lambda x, number: log.append(("first", number))), (block.second, second)]
    outputs = run_staged([call(block, 1), call(block, 2)], [3, 4], stops, after)
    assert log == [
        *(("first", 3), ("first", 4), ("after", 0)),
        *(("second", 3), ("second", 4), ("after", 1)),
    ]
    assert all((x == 7).all() for x in inputs)
    assert torch.equal(outputs[0], block.second(torch.full((2, 4), 7.0)))
    assert not outputs[0].requires_grad


def test_a_batch_may_pass_a_stop_by() -> None:
    block = Block()
    seen: list[int] = []
    stops = [
        (block.first, lambda x, number: seen.append(number)),
        (block.second, lambda x, n: None),
    ]
    outputs = run_staged([call(block, 1, True), call(block, 2)], [0, 1], stops, lambda stop: None)
    assert seen == [1] and len(outputs) == 2


@pytest.mark.parametrize("stop", [0, 1])
def test_an_error_ends_all_batches(stop: int) -> None:
    block = Block()

    def after(number: int) -> None:
        if number == stop:
            raise RuntimeError("no")

    stops = [(block.first, lambda x, n: None), (block.second, lambda x, n: None)]
    with pytest.raises(RuntimeError, match="no"):
        run_staged([call(block, 1), call(block, 2)], [0, 1], stops, after)
    assert block.ended == 2
    assert block(torch.ones(1, 4)).requires_grad  # no hook and no mode stays


def test_an_error_of_a_batch_is_raised() -> None:
    block = Block()

    def observe(x: Tensor, number: int) -> None:
        if number == 1:
            raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        run_staged(
            [call(block, 1), call(block, 2)], [0, 1], [(block.second, observe)], lambda stop: None
        )
    assert block.ended == 2 and torch.is_grad_enabled()


def test_the_end_may_be_the_last_stop() -> None:
    block = Block()
    made = run_staged(
        [call(block, 1)], [0], [(block.first, lambda x, n: None)], lambda s: None, False
    )
    assert made == [] and block.ended == 1


def test_a_mode_of_one_batch_is_none_of_another() -> None:
    """The first batch pauses within a context that the second one doesn't enter."""
    block = nn.Linear(4, 4)
    seen: list[tuple[str, bool]] = []

    def inside() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = block(torch.ones(1, 4))
            seen.append(("inside", torch.is_autocast_enabled("cpu")))
            return value

    def outside() -> Tensor:
        seen.append(("outside", torch.is_autocast_enabled("cpu")))
        return block(torch.ones(1, 4))

    outputs = run_staged([inside, outside], [0, 1], [(block, lambda x, n: None)], lambda stop: None)
    assert seen == [("outside", False), ("inside", True)]
    assert [item.dtype for item in outputs] == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")
