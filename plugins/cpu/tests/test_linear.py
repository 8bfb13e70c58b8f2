"""Products of a few rows with a bf16 weight as it lies, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantmill_cpu import native
from quantmill_cpu.calibrate import dot_levels, no_dots
from quantmill_cpu.linear import ROWS, _linear, linear

pytestmark = pytest.mark.skipif(no_dots() is not None, reason=no_dots() or "")


@pytest.fixture(autouse=True)
def _best_level() -> Iterator[None]:
    yield
    native.use_matmul_level("")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = x.double() @ weight.double().t()
    return found if bias is None else found + bias.double()


def close(found: Tensor, wanted: Tensor, x: Tensor, weight: Tensor) -> bool:
    # A rounding to bf16, and float32's of the sums.
    sums = x.double().abs() @ weight.double().abs().t()
    bound = wanted.abs() * 2**-8 + sums * 2**-20 + 1e-30
    return bool(((found.double() - wanted).abs() <= bound).all())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, ROWS),
    columns=st.integers(1, 300),
    out=st.integers(0, 70),
    bias=st.booleans(),
    threads=st.integers(1, 3),
    level=st.sampled_from(dot_levels() or [""]),
)
def test_any_shape(rows: int, columns: int, out: int, bias: bool, threads: int, level: str) -> None:
    native.use_matmul_level(level)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = draw(rows, columns), draw(out, columns, seed=2)
        more = draw(out, seed=3) if bias else None
        found = linear(x, weight, more)
        assert close(found, exact(x, weight, more), x, weight)
        assert torch.equal(found, _linear(x, weight, more))
        # A row alone gives the same as among others, and so does one thread.
        torch.set_num_threads(1)
        assert torch.equal(linear(x[-1:], weight, more), found[-1:])
    finally:
        torch.set_num_threads(before)


def test_a_large_weight_that_is_mapped_from_a_file(tmp_path: Path) -> None:
    # Odd names shift the data to addresses of whole elements and no more.
    weight = draw(3001, 1027)
    for name in ("w", "wei", "weigh"):
        save_file({name: weight, "o": torch.ones(3, dtype=torch.uint8)}, tmp_path / f"{name}.st")
        there = load_file(tmp_path / f"{name}.st")[name]
        x = draw(3, 1027, seed=4)
        assert close(linear(x, there, None), exact(x, weight, None), x, weight)


def test_activations_in_any_order_and_with_any_dimensions() -> None:
    weight, bias = draw(40, 64), draw(40, seed=5)
    wide = draw(2, 2, 256, seed=6)
    for x in (wide[..., :64], wide[..., ::4], wide[:, 0, 3:67], wide[0, 0, :64]):
        expected = linear(x.contiguous(), weight, bias)
        assert torch.equal(linear(x, weight, bias), expected)
        assert expected.shape == (*x.shape[:-1], 40)


def test_nan_and_infinity_come_out() -> None:
    weight, x = draw(8, 100), draw(2, 100)
    weight[3, 99], weight[5, 0] = float("nan"), float("inf")
    found = linear(x, weight, None)
    assert found.isnan()[:, 3].all() and found.isinf()[:, 5].all()
    assert found[:, [0, 1, 2, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiler_has_it_in_one_graph(bias: bool) -> None:
    weight, more = draw(40, 64), draw(40, seed=5) if bias else None
    compiled = torch.compile(
        lambda x: linear(x, weight, more) * 2, fullgraph=True, backend="aot_eager"
    )
    x = draw(2, 64, seed=7)
    assert torch.equal(compiled(x), linear(x, weight, more) * 2)


def test_bad_arguments_are_refused() -> None:
    weight, x = draw(8, 64), draw(1, 64)
    for arguments in (
        (x.float(), weight, None),
        (x, weight.half(), None),
        (x, weight, torch.zeros(8)),
        (x, weight, draw(7)),
        (x, weight.t(), None),
        (x, draw(64, 8).t(), None),
        (x, draw(8), None),
        (draw(1, 63), weight, None),
        (draw(0, 64), weight, None),
        (draw(ROWS + 1, 64), weight, None),
        (x, weight.to("meta"), None),
    ):
        with pytest.raises(ValueError, match=r"must"):
            linear(*arguments)
