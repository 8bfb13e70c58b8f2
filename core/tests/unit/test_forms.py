"""Forms mean what their documentation says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codebook,
    Codes,
    Flat,
    Group,
    PerTensor,
    ScaledFloat,
)

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 23))


@given(shape=SHAPES, packing=st.sampled_from(["u8", "hi4", "lo4"]), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(shape: tuple[int, int], packing: str, seed: int) -> None:
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed))
    packed = Codes.pack(codes, 4, packing)
    assert torch.equal(packed.unpack().to(torch.int64), codes)
    assert packed.nbytes == Codes.empty(shape, 4, packing, "meta").nbytes


def test_the_first_code_is_where_the_packing_says() -> None:
    codes = torch.tensor([1, 2, 3])
    assert Codes.pack(codes, 4, "hi4").data.reshape(-1).tolist() == [0x12, 0x30]
    assert Codes.pack(codes, 4, "lo4").data.reshape(-1).tolist() == [0x21, 0x03]


@given(shape=SHAPES, size=st.integers(1, 8))
def test_groupings_spread_scales_by_their_definition(shape: tuple[int, int], size: int) -> None:
    rows, columns = shape
    for grouping, group_of in (
        (PerTensor(), lambda r, c: ()),
        (Channel(0), lambda r, c: (r,)),
        (Channel(1), lambda r, c: (c,)),
        (Group(size), lambda r, c: (r, c // size)),
        (Flat(size), lambda r, c: ((r * columns + c) // size,)),
        (Blocks(size, 3), lambda r, c: (r // size, c // 3)),
    ):
        values = torch.randn(grouping.scale_shape(shape))
        spread = grouping.expand(values, shape).expand(shape)
        for r in range(rows):
            for c in range(columns):
                assert spread[r, c] == values[group_of(r, c)]


@pytest.mark.parametrize("kind", ["none", "zero", "minimum"])
def test_affine_offsets_are_evaluated_in_the_stated_order(kind: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (4, 10))
    scale, offset = torch.rand(4, 3), torch.rand(4, 3)
    form = Affine(
        Codes.pack(codes, 4, "hi4"), scale, Group(4), None if kind == "none" else offset, kind
    )
    for r in range(4):
        for c in range(10):
            s, o, q = scale[r, c // 4], offset[r, c // 4], codes[r, c].to(torch.float32)
            want = {"none": q * s, "zero": (q - o) * s, "minimum": q * s + o}[kind]
            assert form.dequantize()[r, c] == want


def test_a_group_index_overrides_consecutive_groups() -> None:
    codes = torch.ones(2, 4, dtype=torch.int64)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    index = torch.tensor([1, 0, 0, 1])
    form = Affine(Codes.pack(codes, 4, "u8"), scale, Group(2), group_index=index)
    assert form.dequantize().tolist() == [[2.0, 1.0, 1.0, 2.0], [4.0, 3.0, 3.0, 4.0]]


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_codebook_picks_the_nearest_entry(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    table = torch.tensor([-1.0, -0.5, -0.1, 0.0, 0.2, 0.4, 0.7, 1.0])
    form = Codebook.quantize(weight, table, 4, bits=3, packing="u8")
    spread = Flat(4).expand(form.scale, shape)
    error = (form.dequantize() - weight).abs()
    best = ((table * spread.unsqueeze(-1)) - weight.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose(error, best, atol=1e-6)


def test_nested_scales_count_in_bytes_and_value() -> None:
    weight = torch.randn(8, 64)
    table = torch.linspace(-1, 1, 16)
    form = Codebook.quantize(weight, table, 16, bits=4, packing="hi4")
    inner = Codebook.quantize(form.scale, torch.linspace(-1, 1, 256), 8, bits=8, packing="u8")
    nested = Codebook(form.codes, table, inner, Flat(16))
    assert nested.nbytes == 256 + 64 + 32 + 1024 + 4 * 4
    assert torch.allclose(nested.dequantize(), form.dequantize(), atol=0.05)


@pytest.mark.parametrize("grouping", [PerTensor(), Channel(0), Blocks(4, 5), Group(4)])
def test_scaled_float_covers_ragged_blocks(grouping: object) -> None:
    torch.manual_seed(1)
    weight = torch.randn(7, 13) * torch.logspace(-3, 3, 7).unsqueeze(1)
    form = ScaledFloat.quantize(weight, torch.float8_e4m3fn, grouping)  # type: ignore[arg-type]
    if not isinstance(grouping, PerTensor | Blocks):
        assert torch.allclose(form.dequantize(torch.float32), weight, rtol=0.07, atol=1e-5)
    assert torch.isfinite(form.dequantize(torch.float32)).all()


def test_row_wise_int8_is_right_on_zeros_and_extremes() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.3, 0.1]])
    form = Affine.quantize_rows_int8(weight)
    assert form.codes.unpack().tolist() == [[0, 0], [127, -127], [127, 42]]
    assert torch.allclose(form.dequantize(), weight, atol=2e-3)


def test_tensors_lists_nested_parts_by_path() -> None:
    inner = Codebook.quantize(torch.rand(4), torch.linspace(-1, 1, 256), 4, bits=8, packing="u8")
    form = Codebook(Codes.pack(torch.zeros(2, 4), 4, "hi4"), torch.zeros(16), inner, Flat(2))
    assert set(form.tensors()) == {"codes", "table", "scale.codes", "scale.table", "scale.scale"}
