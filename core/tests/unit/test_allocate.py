"""The knapsack of a budget: never over it, and never worse than every other allocation."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmill.budget.allocate import allocate, least_bytes


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    targets, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    unit = draw(st.sampled_from([1, 64]))
    size, price = st.integers(1, 60), st.floats(0, 10, allow_nan=False)
    row = st.lists(size, min_size=choices, max_size=choices)
    prices = st.lists(price, min_size=choices, max_size=choices)
    sizes = [[unit * item for item in draw(row)] for _ in range(targets)]
    costs = [draw(prices) for _ in range(targets)]
    return sizes, costs, least_bytes(sizes) + unit * draw(st.integers(0, 150))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_it_is_the_best_of_all(problem: tuple[list[list[int]], list[list[float]], int]) -> None:
    sizes, costs, budget = problem
    chosen = allocate(sizes, costs, budget)

    def total(table: list[list[float]] | list[list[int]], picked: tuple[int, ...]) -> float:
        return sum(row[index] for row, index in zip(table, picked, strict=True))

    assert total(sizes, tuple(chosen)) <= budget
    best = min(
        total(costs, picked)
        for picked in itertools.product(*(range(len(row)) for row in sizes))
        if total(sizes, picked) <= budget
    )
    assert total(costs, tuple(chosen)) == pytest.approx(best, abs=1e-9)


def test_many_targets_of_odd_sizes_stay_within_the_budget() -> None:
    sizes = [[1_000_003 + 17 * n, 2_000_029 + 31 * n, 4_000_037 + 7 * n] for n in range(300)]
    costs = [[1.0 / (n + 1), 0.3 / (n + 1), 0.01 / (n + 1)] for n in range(300)]
    budget = 600_000_000
    chosen = allocate(sizes, costs, budget)
    spent = sum(row[index] for row, index in zip(sizes, chosen, strict=True))
    # Rounding loses less than a percent, and what is left does not buy anything better.
    assert 0.99 * budget < spent <= budget
    assert chosen[0] == 2, "the most sensitive has the best"


def test_what_nothing_can_meet() -> None:
    with pytest.raises(ValueError, match="take 30 bytes, the budget is 29"):
        allocate([[10, 20], [20, 40]], [[1.0, 0.5], [1.0, 0.5]], 29)
