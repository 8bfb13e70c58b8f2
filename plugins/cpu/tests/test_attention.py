"""Attention against PyTorch's in float64: shapes, shared heads, strides, what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantmill_cpu.attention import attention
from quantmill_cpu.calibrate import dot_levels, no_dots
from quantmill_cpu.native import use_matmul_level

pytestmark = pytest.mark.skipif(no_dots() is not None, reason=str(no_dots()))


def made(batch: int, heads: int, tokens: int, dim: int, transposed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * heads + 10 * tokens + dim)
    if transposed:
        return (
            torch.randn(batch, tokens, heads, dim, generator=generator).bfloat16().transpose(1, 2)
        )
    return torch.randn(batch, heads, tokens, dim, generator=generator).bfloat16()


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1).double(), v.repeat_interleave(heads, 1).double()
    return scaled_dot_product_attention(q.double(), k, v, is_causal=causal, scale=scale)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    queries=st.integers(1, 90),
    keys=st.integers(1, 140),
    dim=st.integers(1, 40).map(lambda half: 2 * half) | st.sampled_from([32, 64, 96]),
    value_dim=st.integers(1, 140),
    causal=st.booleans(),
    transposed=st.booleans(),
    level=st.sampled_from(dot_levels() or [""]),
)
def test_it_is_that_of_float64(
    batch: int,
    kv_heads: int,
    shared: int,
    queries: int,
    keys: int,
    dim: int,
    value_dim: int,
    causal: bool,
    transposed: bool,
    level: str,
) -> None:
    use_matmul_level(level)
    q = made(batch, kv_heads * shared, queries, dim, transposed)
    k = made(batch, kv_heads, keys, dim, transposed)
    v = made(batch, kv_heads, keys, value_dim, not transposed)
    scale = dim**-0.5
    found = attention(q, k, v, scale=scale, causal=causal)
    wanted = exact(q, k, v, scale, causal)
    assert found.shape == wanted.shape
    # Shares and the result are rounded to eight bits.
    assert (found.double() - wanted).abs().max() <= 2**-7 * v.abs().max()


def test_a_far_score_takes_all() -> None:
    """Shares of the others are far below float32's smallest number."""
    q, k = torch.ones(1, 1, 3, 2).bfloat16(), torch.ones(1, 1, 5, 2).bfloat16()
    k[0, 0, 3] = 300
    v = torch.arange(5.0).reshape(1, 1, 5, 1).bfloat16()
    assert (attention(q, k, v, scale=1.0, causal=False) == 3).all()


def test_what_is_not_a_number_stays_in_its_row() -> None:
    q, k, v = (made(1, 1, 20, 8, False) for _ in range(3))
    q[0, 0, 7, 1] = torch.nan
    found = attention(q, k, v, scale=1.0, causal=True)
    assert found[0, 0, 7].isnan().all()
    assert found[0, 0, [row for row in range(20) if row != 7]].isfinite().all()


def test_threads_change_nothing() -> None:
    q, k, v = made(1, 6, 100, 16, False), made(1, 2, 100, 16, True), made(1, 2, 100, 24, True)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(attention(q, k, v, scale=0.25, causal=True))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("wrong", ["dim", "heads", "dtype", "layout", "keys", "values"])
def test_what_it_cannot_take_is_refused(wrong: str) -> None:
    shapes = {"q": [1, 4, 8, 16], "k": [1, 2, 8, 16], "v": [1, 2, 8, 16]}
    if wrong == "dim":
        shapes |= {"q": [1, 4, 8, 15], "k": [1, 2, 8, 15]}
    elif wrong == "heads":
        shapes["q"] = [1, 3, 8, 16]
    elif wrong == "keys":
        shapes |= {"k": [1, 2, 0, 16], "v": [1, 2, 0, 16]}
    elif wrong == "values":
        shapes["v"] = [1, 2, 9, 16]
    dtype = torch.float16 if wrong == "dtype" else torch.bfloat16
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in shapes.values())
    if wrong == "layout":
        k = torch.zeros(1, 2, 16, 8, dtype=dtype).transpose(2, 3)
    with pytest.raises(ValueError, match=r"must|no keys"):
        attention(q, k, v, scale=1.0, causal=False)
