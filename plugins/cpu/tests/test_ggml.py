"""ggml's types: every level and any number of threads give the same bytes, and no call errs.

That these are the bytes of the types' definitions is tested where both packages are.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantmill_cpu import native
from quantmill_cpu.ggml import codes, dequantize, quantize
from quantmill_cpu.ggml_matmul import bind
from quantmill_cpu.ggml_types import TYPES

MADE = [name for name, item in TYPES.items() if item.made]
GUARD = 0x5A


def form(name: str, data: Tensor) -> Any:
    """What the kernel reads of a form, with a lattice of the test's own."""
    kind = TYPES[name]
    points = (torch.arange(kind.points) % 7 - 3).to(torch.int8)
    shape = (*data.shape[:-1], data.shape[-1] // kind.size * kind.values)
    return SimpleNamespace(
        data=data, type_name=name, points=points, shape=shape, tensors=lambda: {"data": data}
    )


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output between two guards; and these."""
    size = count * dtype.itemsize
    whole = torch.full((size + 128,), GUARD, dtype=torch.uint8)
    return whole[64 : 64 + size].view(dtype), torch.stack([whole[:64], whole[64 + size :]])


def made(name: str, source: Tensor, importance: Tensor | None = None) -> Tensor:
    row = source.shape[1] // TYPES[name].values * TYPES[name].size
    out, guards = guarded(source.shape[0] * row, torch.uint8)
    quantize(source, type_name=name, importance=importance, out=out)
    assert bool((guards == GUARD).all()), "written beyond the output"
    return out.reshape(-1, row)


def values_of(name: str, data: Tensor) -> Tensor:
    blocks = form(name, data)
    count = data.numel() // TYPES[name].size * TYPES[name].values
    out, guards = guarded(count, torch.float32)
    dequantize(blocks, torch.float32, out)
    assert bool((guards == GUARD).all()), "written beyond the output"
    return out.reshape(blocks.shape)


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SIZES = {"rows": st.integers(1, 9), "across": st.integers(1, 9), "seed": st.integers(0, 2**31)}


@settings(deadline=None, max_examples=120)
@given(name=st.sampled_from(MADE), scale=st.sampled_from([1.0, 0.02, 1e-7, 1e-30]), **SIZES)
def test_levels_and_threads_make_the_same_blocks(
    name: str, scale: float, rows: int, across: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = across * TYPES[name].values
    source = torch.randn(rows, columns, generator=generator) * scale
    source[source.abs() < 0.2 * scale] = 0.0
    importance = torch.rand(columns, generator=generator) if seed % 2 else None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        block = source.to(dtype)
        found = []
        for level in native.levels():
            native.use_level(level)
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(made(name, block, importance))
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert torch.equal(found[0], made(name, block.to(torch.float32), importance))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(MADE),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    odd=st.sampled_from([None, float("nan"), -float("nan"), float("inf"), -float("inf")]),
    **SIZES,
)
def test_the_largest_magnitude_is_told_and_so_is_what_is_not_finite(
    name: str, dtype: torch.dtype, odd: float | None, rows: int, across: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(rows, across * TYPES[name].values, generator=generator).to(dtype)
    if odd is not None:
        block.view(-1)[seed % block.numel()] = odd
    out = torch.empty(rows, across * TYPES[name].size, dtype=torch.uint8)
    for count in (1, 3):
        torch.set_num_threads(count)
        largest = quantize(block, type_name=name, importance=None, out=out)
        if odd is None:
            assert largest == float(block.abs().max())
        else:
            assert not math.isfinite(largest)


@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from(list(TYPES)), **SIZES)
def test_levels_and_threads_decode_any_bytes_alike(
    name: str, rows: int, across: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = rows * across * TYPES[name].size
    whole = torch.randint(0, 256, (size + 1,), dtype=torch.uint8, generator=generator)
    data = whole[1:].reshape(rows, -1)  # a tensor of a mapped file starts anywhere
    wanted = values_of(name, data.clone())
    for level in native.levels():
        native.use_level(level)
        torch.set_num_threads(1 + seed % 3)
        found = values_of(name, data)
        same = found.view(torch.int32) == wanted.view(torch.int32)
        assert bool((same | (found.isnan() & wanted.isnan())).all()), level


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(list(TYPES)), tokens=st.integers(0, 9), **SIZES)
def test_products_are_those_of_decoded_floats(
    name: str, tokens: int, rows: int, across: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = rows * across * TYPES[name].size
    whole = torch.randint(0, 256, (size + 1,), dtype=torch.uint8, generator=generator)
    data = whole[1:].reshape(rows, -1)
    weight = values_of(name, data).double()
    x = torch.randn(tokens, weight.shape[1], generator=generator)
    bias = torch.randn(rows, generator=generator) if seed % 2 else None
    more = torch.zeros(rows) if bias is None else bias
    wanted = x.double() @ weight.T + more
    reach = x.double().abs() @ weight.T.abs() + more.abs() + 1e-20
    usual = (reach < 1e30) & wanted.isfinite()  # random scales may be anything
    for level in native.levels():
        native.use_level(level)
        torch.set_num_threads(1 + seed % 3)
        found = bind(form(name, data))(x, bias)
        assert found.shape == (tokens, rows)
        assert bool(((found - wanted).abs() <= 1e-6 * reach)[usual].all()), level


def test_products_refuse_what_does_not_fit() -> None:
    call = bind(form("Q8_0", torch.zeros(2, 34, dtype=torch.uint8)))
    for x, bias in ((torch.zeros(1, 64), None), (torch.zeros(1, 32), torch.zeros(3))):
        with pytest.raises(ValueError, match="must be"):
            call(x, bias)
    with pytest.raises(ValueError, match="whole blocks"):
        bind(form("Q8_0", torch.zeros(2, 33, dtype=torch.uint8)))


@pytest.mark.parametrize("name", MADE)
def test_blocks_are_close_to_what_they_were_made_of(name: str) -> None:
    source = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    error = (values_of(name, made(name, source)) - source).norm() / source.norm()
    bits = 8 * TYPES[name].size / TYPES[name].values
    # Ternary types are for weights that are ternary.
    assert float(error) < (0.85 if bits < 2.5 else 2.6 * 2.0**-bits + 0.02)
    half = dequantize(form(name, made(name, source)), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.shape == source.shape


def test_a_compiled_graph_contains_it() -> None:
    blocks = form("Q4_K", made("Q4_K", torch.randn(4, 256)))

    def product(x: Tensor) -> Tensor:
        return x @ dequantize(blocks, torch.float32).t()

    x = torch.randn(2, 256)
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), product(x))


OUT = torch.empty(2, 18, dtype=torch.uint8)
WRONG: dict[str, dict[str, Any]] = {
    "unknown type": {"type_name": "Q9_9"},
    "type that can't be made": {"type_name": "IQ2_XXS"},
    "ragged": {"block": torch.ones(2, 31)},
    "float64": {"block": torch.ones(2, 32, dtype=torch.float64)},
    "one dimension": {"block": torch.ones(32)},
    "not contiguous": {"block": torch.ones(32, 2).t()},
    "no data": {"block": torch.ones(2, 32, device="meta")},
    "importance too short": {"importance": torch.ones(31)},
    "importance of the wrong dtype": {"importance": torch.ones(32, dtype=torch.float64)},
    "output too short": {"out": OUT[:1]},
    "output of the wrong dtype": {"out": OUT.view(torch.int8)},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what: str) -> None:
    good = {"block": torch.ones(2, 32), "type_name": "Q4_0", "importance": None, "out": OUT}
    quantize(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"block|importance|out|can be made"):
        quantize(**{**good, **WRONG[what]})  # type: ignore[arg-type]


def test_what_can_not_be_decoded_is_refused() -> None:
    data = torch.zeros(2, 66, dtype=torch.uint8)
    good = form("IQ2_XXS", data)
    for change in (
        {"type_name": "Q9_9"},
        {"data": data[:, :65]},
        {"data": data.to(torch.int8)},
        {"points": good.points[1:]},
    ):
        with pytest.raises(ValueError, match=r"data|points|no type|out"):
            dequantize(SimpleNamespace(**{**vars(good), **change}), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out"):
        dequantize(good, torch.float32, torch.empty(2, 255))


def test_codes_that_do_not_fit_are_refused() -> None:
    data, out = torch.zeros(2, 18, dtype=torch.uint8), torch.empty(32, 1, dtype=torch.uint8)
    good = {"data": data, "type_name": "Q4_0", "out": out}
    codes(**good)  # type: ignore[arg-type]
    for change in (
        {"type_name": "TQ1_0"},
        {"type_name": "Q9_9"},
        {"data": data[:, :17]},
        {"data": data.to(torch.int16)},
        {"out": out[1:]},
        {"out": out.view(torch.int8)},
    ):
        with pytest.raises(ValueError, match=r"data|out|no codes"):
            codes(**{**good, **change})  # type: ignore[arg-type]


def test_nothing_gives_nothing() -> None:
    for name in MADE:
        assert made(name, torch.empty(0, TYPES[name].values)).shape[0] == 0
        assert values_of(name, torch.empty(0, TYPES[name].size, dtype=torch.uint8)).numel() == 0
