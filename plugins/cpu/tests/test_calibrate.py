"""What calibration computes natively: moments against float64, panels against their meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantmill_cpu.calibrate import compensate, descend, dot_levels, moments, no_dots, product
from quantmill_cpu.native import level, levels, use_level, use_matmul_level

needs_dots = pytest.mark.skipif(no_dots() is not None, reason=str(no_dots()))


@needs_dots
@pytest.mark.parametrize("tokens", [1, 7, 1024, 1501])
@pytest.mark.parametrize("columns", [1, 40, 64, 200])
@pytest.mark.parametrize("dots", dot_levels())
def test_moments_are_those_of_float64(tokens: int, columns: int, dots: str) -> None:
    use_matmul_level(dots)
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    before = torch.randn(columns, columns)
    total = before.clone()
    moments(x, out=total)
    exact = before.double() + x.double().t() @ x.double()
    error = (total.double() - exact).triu().abs().max() / exact.diagonal().abs().max()
    assert error < 1e-5


@needs_dots
def test_moments_do_not_depend_on_threads() -> None:
    x = torch.randn(1100, 300).to(torch.bfloat16)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.zeros(300, 300))
        moments(x, out=found[-1])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_dots
def test_moments_tell_of_infinity() -> None:
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    x[2, 3] = torch.inf
    total = torch.zeros(8, 8)
    moments(x, out=total)
    assert not torch.isfinite(total[3, 3]) and torch.isfinite(total[2, 2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 8, 48), (192, 33, 192), (450, 130, 500)], ids=str)
@pytest.mark.parametrize("name", levels())
def test_products_are_those_of_float64(shape: tuple[int, int, int], name: str) -> None:
    depth, rows, columns = shape
    before = level()
    use_level(name)
    try:
        wide, b = torch.randn(depth, rows + 7), torch.randn(depth, columns)
        turned = torch.randn(rows, depth + 5)[:, 2 : depth + 2].t()
        for a in (
            wide[:, 3 : rows + 3],
            wide[:, :rows].contiguous(),
            turned,
            wide[:, :1].expand(-1, rows),
        ):
            found = product(a, b)
            exact = a.double().t() @ b.double()
            assert found.shape == (rows, columns)
            assert (found - exact).abs().max() < 2e-5 * depth**0.5
    finally:
        use_level(before)


def test_products_of_nothing() -> None:
    assert torch.equal(product(torch.ones(0, 3), torch.ones(0, 2)), torch.zeros(3, 2))
    assert product(torch.ones(4, 0), torch.ones(4, 2)).shape == (0, 2)
    assert product(torch.ones(4, 3), torch.ones(4, 0)).shape == (3, 0)


def test_products_do_not_depend_on_threads() -> None:
    a, b = torch.randn(700, 150), torch.randn(700, 900)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product(a, b))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(3, 2), torch.ones(4, 2)),
        (torch.ones(3), torch.ones(3, 2)),
        (torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2)),
        (torch.ones(3, 2), torch.ones(3, 2).double()),
        (torch.ones(3, 2), torch.ones(2, 3).t()),
        (torch.ones(3, 2, device="meta"), torch.ones(3, 2)),
    ],
)
def test_products_of_other_tensors_are_refused(a: Tensor, b: Tensor) -> None:
    with pytest.raises(ValueError, match="must"):
        product(a, b)


def panel(columns: int, rows: int, width: int) -> dict[str, Any]:
    """A panel of weights, moments of its inputs, and its groups."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(4 * columns, columns, generator=generator)
    square = x.t() @ x / len(x) + 0.1 * torch.eye(columns)
    groups = [column // width for column in range(columns)]
    starts = [column for column in range(columns) if column % width == 0]
    sizes = [min(width, columns - start) for start in starts]
    begins, ends = [0] * columns, [0] * columns
    for start, size in zip(starts, sizes, strict=True):
        begins[start] = ends[start + size - 1] = size
    return {
        "weight": torch.randn(columns, rows, generator=generator),
        "square": square,
        "factor": torch.linalg.cholesky(torch.linalg.inv(square)).t().contiguous(),
        "groups": groups,
        "begins": begins,
        "ends": ends,
        "count": len(starts),
    }


def both(facts: dict[str, Any], top: int, symmetric: bool, exponent: float) -> list[Tensor]:
    """What the two kernels make of a panel, one after the other."""
    rows = facts["weight"].shape[1]
    scales, zeros = torch.ones(2, facts["count"], rows).unbind()
    errors = facts["weight"].clone()
    codes = torch.zeros(errors.shape, dtype=torch.uint8)
    compensate(
        errors,
        facts["factor"],
        facts["groups"],
        facts["begins"],
        scales,
        zeros,
        codes,
        top=top,
        symmetric=symmetric,
        exponent=exponent,
    )
    first = scales.clone()
    steps = codes.float() - zeros[facts["groups"]]
    moved = facts["square"] @ (facts["weight"] - steps * scales[facts["groups"]])
    descend(moved, facts["square"], facts["groups"], facts["ends"], scales, zeros, steps, top=top)
    return [errors, first, zeros, codes, scales, steps, moved]


@pytest.mark.parametrize(
    ("columns", "rows", "width", "top", "symmetric", "exponent"),
    [
        (128, 64, 128, 15, True, 2.0),
        (128, 37, 32, 15, False, 2.0),
        (96, 1, 40, 3, True, 0.0),
        (17, 33, 17, 255, False, 2.4),
    ],
)
def test_a_panel_means_what_it_says(
    columns: int, rows: int, width: int, top: int, symmetric: bool, exponent: float
) -> None:
    facts = panel(columns, rows, width)
    errors, first, zeros, codes, scales, steps, moved = both(facts, top, symmetric, exponent)
    groups, weight, square = facts["groups"], facts["weight"], facts["square"]
    before = (codes.float() - zeros[groups]) * first[groups]
    # Errors come back through the factor as what the weight lacks.
    torch.testing.assert_close(facts["factor"].t() @ errors, weight - before, atol=1e-3, rtol=1e-3)
    after = steps * scales[groups]
    torch.testing.assert_close(after - before, moved, atol=1e-5, rtol=1e-5)

    def loss(rounded: Tensor) -> Tensor:
        lacking = weight - rounded
        return ((square @ lacking) * lacking).sum(0)

    nearest = (weight / first[groups] + zeros[groups]).round().clamp(0, top) - zeros[groups]
    assert loss(before).mean() < loss(nearest * first[groups]).mean()
    assert (loss(after) <= loss(before) * (1 + 1e-4)).all() and loss(after).sum() < loss(
        before
    ).sum()


def test_levels_give_the_same_bytes() -> None:
    facts = panel(128, 70, 32)
    used, found = level(), []
    for name in levels():
        use_level(name)
        found.append(both(facts, 15, False, 2.0))
    use_level(used)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    facts = panel(128, 8, 32)
    scales = torch.ones(4, 8)
    codes = torch.zeros(128, 8, dtype=torch.uint8)
    arguments = [facts["weight"], facts["factor"], facts["groups"], facts["begins"]]
    options = {"top": 15, "symmetric": True, "exponent": 2.0}
    for wrong in (
        [*arguments, scales, scales.double(), codes],
        [*arguments, scales[:3].clone(), scales[:3].clone(), codes],
        [*arguments[:3], [129] * 128, scales, scales, codes],
        [*arguments[:3], [*[0] * 127, 2], scales, scales, codes],
        [*arguments, scales, scales, codes[:5]],
        [arguments[0].t(), *arguments[1:], scales, scales, codes],
        [
            torch.ones(129, 8),
            torch.eye(129),
            [0] * 129,
            [0] * 129,
            scales,
            scales,
            torch.zeros(129, 8, dtype=torch.uint8),
        ],
    ):
        with pytest.raises(ValueError, match=r"must be|must have|at most 128"):
            compensate(*wrong, **options)
    with pytest.raises(ValueError, match=r"spans\[0\] must be 0 to 1"):
        descend(*arguments[:3], [2, *[0] * 127], scales, scales, torch.zeros(128, 8), top=15)
    if no_dots() is None:
        for x, out in (
            (torch.ones(4, 8), torch.zeros(8, 8)),
            (torch.ones(4, 8, dtype=torch.bfloat16), torch.zeros(8, 9)),
        ):
            with pytest.raises(ValueError, match="must be"):
                moments(x, out=out)
