"""Calibrating experts: their order, and what few tokens are worth."""

from __future__ import annotations

import pytest
import torch

from quantmill.calibration.mixture import few_tokens, in_order_of_experts, shrunk
from quantmill.experts import Matrix, Stack, matrix_modules
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target, targets_of


def _linear(name: str) -> Target:
    return targets_of(
        ModuleInfo(name, "linear", "Linear", {"weight": ParameterInfo("w", (4, 8), "F32")})
    )[0]


def _experts(owner: str, count: int = 3) -> list[Target]:
    matrices = (
        Matrix("gate_proj", "gate_up_proj", (0, 4, 1), 8, False),
        Matrix("up_proj", "gate_up_proj", (4, 8, 1), 8, False),
        Matrix("down_proj", "down_proj", (0, 8, 1), 4, False),
    )
    return [targets_of(item)[0] for item in matrix_modules(owner, Stack(count, matrices))]


def test_experts_run_by_number_whichever_was_reached_first() -> None:
    q, shared, mixture = _linear("q"), _linear("shared"), _experts("e")
    by_name = {item.name: item for item in mixture}
    met = [
        [q],
        # Slices of one tensor look like one input.
        [by_name["e.1.gate_proj"], by_name["e.1.up_proj"], by_name["e.2.gate_proj"]],
        [by_name["e.1.down_proj"]],
        [by_name["e.2.up_proj"]],
        [shared],
        [by_name["e.2.down_proj"]],
        [by_name["e.0.gate_proj"]],
    ]
    found = in_order_of_experts(met, [q, *mixture, shared])
    assert [[item.name for item in group] for group in found] == [
        ["q"],
        ["e.0.gate_proj", "e.0.up_proj"],
        ["e.0.down_proj"],
        ["e.1.gate_proj", "e.1.up_proj"],
        ["e.1.down_proj"],
        ["e.2.gate_proj", "e.2.up_proj"],
        ["e.2.down_proj"],
        ["shared"],
    ]


@pytest.mark.parametrize("tokens", [1, 4, 16, 48])
def test_few_tokens_are_drawn_towards_the_diagonal(tokens: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(tokens, 64) * torch.rand(64)
    moments = inputs.t() @ inputs / tokens
    found = shrunk(moments, tokens)
    assert torch.equal(found.diagonal(), moments.diagonal())
    # Independent columns: what lies beside the diagonal is chance, and most of it goes.
    beside = ~torch.eye(64, dtype=torch.bool)
    assert found[beside].norm() < 0.25 * moments[beside].norm()
    if tokens > 1:
        assert torch.linalg.eigvalsh(found).min() > -1e-6


def test_true_correlations_stay_and_enough_tokens_are_trusted() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 1) + 0.1 * torch.randn(40, 64)
    moments = inputs.t() @ inputs / 40
    beside = ~torch.eye(64, dtype=torch.bool)
    assert shrunk(moments, 40)[beside].norm() > 0.95 * moments[beside].norm()
    assert shrunk(moments, 64) is moments
    nothing = torch.zeros(8, 8)
    assert torch.equal(shrunk(nothing, 0), nothing) and torch.equal(shrunk(nothing, 3), nothing)


def test_few_tokens_are_told_of() -> None:
    targets = [_linear("q"), *_experts("e")]
    tokens = {item.name: 9 for item in targets[1:]}
    assert few_tokens("block", targets, tokens) is None
    finding = few_tokens("block", targets, {**tokens, "e.1.up_proj": 0, "e.2.up_proj": 7})
    assert finding is not None and finding.code == "QM-CALIB-060"
    assert (
        finding.where == "e.1.up_proj"
        and "2 of 10" in finding.cause
        and "1 saw none" in finding.cause
    )
