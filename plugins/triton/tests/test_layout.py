"""The live layout: exact there and back, the same on the meta device, plain where it can't be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codebook,
    Codes,
    Flat,
    Form,
    Group,
    PerTensor,
    ScaledFloat,
)
from quantmill_triton.layout import is_plain, prepare, restore

TABLE = torch.linspace(-1, 1, 16) ** 3
DYNAMIC = torch.linspace(-1, 1, 256) ** 3


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_round_trip(form: Form) -> dict[str, torch.Tensor]:
    tensors, meta = prepare(form), prepare(form.to("meta"))
    back = restore(tensors, form.to("meta"))
    before, after = form.tensors(), back.tensors()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        assert torch.equal(
            after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name
    assert nbytes(meta) >= nbytes(tensors)
    assert is_plain(meta) == is_plain(tensors)
    return tensors


@pytest.mark.parametrize("shape", [(96, 512), (70, 300), (1, 17), (33, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("packing", ["u8", "dense"])
def test_affine_codes_of_all_widths_come_back(
    bits: int, packing: str, shape: tuple[int, int]
) -> None:
    for offset in ("zero", "minimum"):
        form = Affine.quantize(weight(*shape), bits, Group(32), offset=offset, packing=packing)
        assert not is_plain(check_round_trip(form))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [torch.float32, torch.float16, torch.uint8, torch.int32])
def test_scales_and_zeros_keep_their_dtypes(dtype: torch.dtype, offset: torch.dtype) -> None:
    form = Affine.quantize(weight(70, 300), 4, Group(64), scale_dtype=dtype)
    assert isinstance(form.offset, torch.Tensor)
    for zeros in (form.offset.to(offset), form.offset.to(offset) + 120):
        tensors = check_round_trip(replace(form, offset=zeros))
        assert ("pairs" in tensors) == (float(zeros.max()) <= 127)


@pytest.mark.parametrize("zero", [0.5, -1.0, -0.0, 128.0, float("nan"), float("inf")])
def test_zeros_that_are_no_small_integers_stay_as_they_are(zero: float) -> None:
    form = Affine.quantize(weight(64, 256), 4, Group(64))
    assert isinstance(form.offset, torch.Tensor)
    odd = form.offset.clone()
    odd[0, 0] = zero
    assert "offset" in check_round_trip(replace(form, offset=odd))


@pytest.mark.parametrize("grouping", [Channel(0), PerTensor(), Group(16), Group(4096)])
def test_groupings_come_back(grouping: Channel | PerTensor | Group) -> None:
    assert not is_plain(check_round_trip(Affine.quantize(weight(70, 300), 8, grouping)))


def test_signed_bytes_come_back() -> None:
    check_round_trip(Affine.quantize_rows_int8(weight(70, 300)))


@pytest.mark.parametrize("packing", ["hi4", "lo4", "u8", "dense"])
@pytest.mark.parametrize("shape", [(96, 512), (70, 192), (3, 64), (1, 64)])
def test_tables_of_sixteen_come_back(packing: str, shape: tuple[int, int]) -> None:
    form = Codebook.quantize(weight(*shape), TABLE, 64, bits=4, packing=packing)
    tensors = check_round_trip(form)
    assert tensors["lut"].shape == (2, 8)


def test_the_unused_nibble_of_an_odd_count_comes_back() -> None:
    codes = Codes.pack(torch.randint(0, 16, (3, 35), dtype=torch.uint8), 4, "hi4", pad=11)
    form = Codebook(codes, TABLE, torch.rand(3, 1), Group(64))
    assert "tail" in check_round_trip(form)


def test_nested_scales_come_back_and_are_expanded() -> None:
    form = Codebook.quantize(weight(64, 512), TABLE, 64, bits=4, packing="hi4")
    assert isinstance(form.scale, torch.Tensor)
    nested = Codebook.quantize_dynamic(form.scale - form.scale.mean(), DYNAMIC, 256)
    form = replace(form, scale=replace(nested, offset=form.scale.mean()))
    tensors = check_round_trip(form)
    assert tensors["scale"].dtype == torch.float32
    assert "scale.codes" in tensors


@pytest.mark.parametrize("values", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("grouping", [Blocks(32, 128), Blocks(100, 16), Group(32), PerTensor()])
def test_floats_of_eight_bits_come_back(
    values: torch.dtype, grouping: Blocks | Group | PerTensor
) -> None:
    check_round_trip(ScaledFloat.quantize(weight(70, 300), values, grouping))


def test_power_of_two_scales_come_back() -> None:
    form = ScaledFloat.quantize(weight(70, 320), torch.float8_e4m3fn, Group(32))
    assert isinstance(form.scale, torch.Tensor)
    assert not is_plain(check_round_trip(replace(form, scale=form.scale.to(torch.float8_e8m0fnu))))


def test_a_group_index_comes_back_sorted_or_not() -> None:
    form = Affine.quantize(weight(64, 500), 4, Group(64))
    index = torch.arange(500) // 64
    for chosen in (index, index[torch.randperm(500)], index.to(torch.int32)):
        assert "order" in check_round_trip(replace(form, group_index=chosen))


@pytest.mark.parametrize(
    "form",
    [
        Codebook.quantize(weight(5, 72), TABLE, 64, bits=4, packing="hi4"),  # blocks cross rows
        Affine.quantize(weight(2, 64, 64), 4, Group(64)),
        replace(
            Affine.quantize(weight(64, 128), 4, Group(64)),
            group_index=torch.arange(128) % 100 // 64,
        ),
        Affine.quantize(weight(64, 128), 7, Group(64)),
        Affine.quantize(weight(64, 120), 4, Group(24)),
        Affine.quantize(weight(64, 128), 4, Flat(96)),
        replace(
            Codebook.quantize(weight(64, 64), TABLE, 64, bits=4, packing="hi4"),
            offset=torch.tensor(0.5),
        ),
    ],
    ids=["ragged blocks", "stacked", "uneven groups", "7 bits", "groups of 24", "flat", "offset"],
)
def test_what_the_layout_cannot_hold_is_kept_as_it_is(form: Form) -> None:
    tensors = prepare(form)
    assert is_plain(tensors)
    assert nbytes(tensors) == form.nbytes
    back = restore(tensors, form.to("meta"))
    assert all(torch.equal(tensor, back.tensors()[name]) for name, tensor in form.tensors().items())


def test_live_bytes_are_about_the_forms() -> None:
    form = Affine.quantize(weight(256, 1024), 4, Group(128), scale_dtype=torch.bfloat16)
    assert nbytes(prepare(form)) <= form.nbytes
    plain = Codebook.quantize(weight(256, 1024), TABLE, 64, bits=4, packing="hi4")
    assert nbytes(prepare(plain)) == plain.nbytes + 72
