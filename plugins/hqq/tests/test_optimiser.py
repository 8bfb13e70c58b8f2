"""The half-quadratic search against the published iteration, and its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantmill_hqq.optimiser import errors, solve


def published(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The iteration as its authors describe it: one stopping rule for all, the last zero points.

    Codes, scales and zero points of groups ``weight [groups, size]``.
    """
    top, norm, beta = 2**bits - 1, 0.7, 10.0
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    inverse = (top / (high - low)).clamp(max=2e4)
    zero = -low * inverse
    if bits == 4:
        zero = zero.round()
    least = float("inf")
    for _ in range(20):
        codes = (weight * inverse + zero).round().clamp(0, top)
        error = weight - (codes - zero) / inverse
        size = error.abs()
        kept = error.sign() * (size - size.pow(norm - 1) / beta).clamp(min=0)
        zero = (codes - (weight - kept) * inverse).mean(1, keepdim=True)
        beta *= 1.01
        if float(size.mean()) >= least:
            break
        least = float(size.mean())
    codes = (weight * inverse + zero).round().clamp(0, top)
    return codes, 1 / inverse, zero


def objective(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> float:
    scale, zero = scale.reshape(-1, 1).float(), zero.reshape(-1, 1).float()
    return float((weight - scale * (codes - zero)).abs().pow(0.7).mean())


def draw(kind: str, seed: int, groups: int = 1024) -> Tensor:
    torch.manual_seed(seed)
    if kind == "outliers":
        return torch.distributions.StudentT(4.0).sample((groups, 64)) * 0.02
    if kind == "shifted":
        return torch.rand(groups, 64) * 0.1 + 0.05
    return torch.randn(groups, 64) * (0.02 if kind == "small" else 1.0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["small", "large", "outliers", "shifted"])
def test_the_objective_is_no_worse_than_published(kind: str, bits: int) -> None:
    weight = draw(kind, seed=bits)
    ours = objective(weight, *solve(weight, bits, torch.float32))
    theirs = objective(weight, *published(weight, bits))
    plain = objective(weight, *solve(weight, bits, torch.float32, iters=0))
    assert ours <= theirs * 1.001
    assert ours <= plain


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    groups=st.integers(1, 40),
    size=st.sampled_from([1, 7, 8, 24, 64]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_group_does_not_depend_on_the_others(
    bits: int, groups: int, size: int, seed: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(groups, size, generator=torch.Generator().manual_seed(seed))
    codes, scale, zero = solve(weight, bits, dtype)
    assert scale.dtype == zero.dtype == dtype and int(codes.max()) < 2**bits
    which = seed % groups
    one = solve(weight[which : which + 1], bits, dtype)
    assert torch.equal(one[0][0], codes[which])
    assert one[1] == scale[which] and one[2] == zero[which]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_zero_point_is_the_best_of_what_was_tried(dtype: torch.dtype) -> None:
    weight = draw("outliers", seed=3)
    _, scale, zero = solve(weight, 3, dtype)
    scaled = weight / scale.float().unsqueeze(1)
    nearest = (-scaled.amin(1)).to(dtype).float()
    assert bool((errors(scaled, zero.float(), 3, 0.7) <= errors(scaled, nearest, 3, 0.7)).all())


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.5, 1e-30, 3e4])
def test_constant_groups_are_exact_or_zero(bits: int, dtype: torch.dtype, value: float) -> None:
    weight = torch.full((3, 64), value).to(dtype).float()
    codes, scale, zero = solve(weight, bits, dtype)
    back = (codes - zero.float().unsqueeze(1)) * scale.float().unsqueeze(1)
    assert torch.isfinite(back).all()
    assert torch.equal(back, weight)


def test_the_largest_floats_stay_finite() -> None:
    weight = torch.tensor([[3e38, -3e38] * 4])
    codes, scale, zero = solve(weight, 4, torch.float32)
    assert torch.isfinite((codes - zero.unsqueeze(1)) * scale.unsqueeze(1)).all()
