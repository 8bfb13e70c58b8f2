"""Forms in other layouts: equal values, or a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmill.findings import QuantmillError
from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codebook,
    Codes,
    Flat,
    Form,
    Group,
    Grouping,
    PerTensor,
    ScaledFloat,
    float_rows,
)
from quantmill.forms.fit import Conditions, Zeros, fit_floats, fit_integers, is_symmetric

SCALES = (torch.float16, torch.bfloat16, torch.float32)
KINDS: tuple[Zeros, ...] = ("integer", "middle", "signed", "float", "minimum")
ROWS, COLUMNS = 6, 24


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def made(
    bits: int, grouping: Grouping, symmetric: bool, seed: int = 0, dtype: Any = torch.float16
) -> Affine:
    return Affine.quantize(weight(seed), bits, grouping, symmetric=symmetric, scale_dtype=dtype)


def meta(form: Form) -> Form:
    return form.map_tensors(lambda tensor: tensor.to("meta"))


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(1, 8),
    grouping=st.sampled_from([PerTensor(), Channel(0), Group(8), Group(12), Flat(6), Blocks(2, 8)]),
    symmetric=st.booleans(),
    kind=st.sampled_from(KINDS),
    widths=st.sampled_from([(4,), (8,), (2, 3, 4, 8), tuple(range(1, 9))]),
    size=st.sampled_from([None, 2, 4, 8, 24]),
    ordered=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 20),
)
def test_what_fits_has_the_same_values(
    bits: int,
    grouping: Grouping,
    symmetric: bool,
    kind: Zeros,
    widths: tuple[int, ...],
    size: int | None,
    ordered: bool,
    turned: bool,
    seed: int,
) -> None:
    form = made(bits, grouping, symmetric, seed)
    if turned:  # as GGUF's Q4_0 has them: scales of either sign
        assert isinstance(form.scale, torch.Tensor)
        signs = torch.rand(form.scale.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        form = replace(form, scale=torch.where(signs, -form.scale, form.scale))
    if ordered and isinstance(grouping, Group):
        order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed))
        index = (order // grouping.size).to(torch.int32)
        form = Affine(form.codes, form.scale, grouping, form.offset, "zero", index)
    options: dict[str, Any] = {"bits": widths, "zeros": kind, "scales": SCALES, "size": size}
    options |= {"positive": turned}
    try:
        found = fit_integers(form, ordered=ordered, **options)
    except QuantmillError:
        return  # the reasons have tests of their own
    assert torch.equal(found.dequantize(torch.float32), form.dequantize(torch.float32))
    assert isinstance(found.grouping, Group) and found.codes.bits in (
        (8,) if kind == "signed" else widths
    )
    assert size is None or found.grouping.size == size
    if kind == "signed":
        assert found.codes.packing == "i8" and found.offset is None
    if kind == "middle":
        assert is_symmetric(found)
    if turned and kind != "minimum":
        assert isinstance(found.scale, torch.Tensor) and bool((found.scale >= 0).all())
    # Without data the answer is the same in shapes and bytes, under conditions.
    dry = Conditions()
    guess = fit_integers(meta(form), ordered=ordered, seen=dry, **options)
    assert guess.nbytes == found.nbytes or dry.unless


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_codes_move_into_wider_ones_around_the_middle(bits: int) -> None:
    form = made(bits, Group(8), False)
    seen = Conditions()
    found = fit_integers(form, bits=(8,), zeros="signed", scales=SCALES, size=4, seen=seen)
    assert torch.equal(found.dequantize(), form.dequantize())
    assert seen.notes == [f"codes of {bits} bits are stored in 8"]


def refused(form: Form, **options: Any) -> str:
    with pytest.raises(QuantmillError) as caught:
        fit_integers(form, **{"bits": (4,), "zeros": "integer", "scales": SCALES, **options})
    assert caught.value.findings[0].code == "QM-FORM-001"
    return caught.value.findings[0].cause


def test_every_reason_is_named() -> None:
    form = made(4, Group(8), False)
    assert "8 columns, asked are 16" in refused(form, size=16)
    assert "8 columns, asked are 3" in refused(form, size=3)
    assert "around the middle" in refused(form, zeros="middle")
    assert "4 bits" in refused(form, bits=(2, 3))
    wide = made(4, Group(8), False, dtype=torch.float32)
    assert "float32" in refused(wide, scales=SCALES[:2])
    scaled = Affine(form.codes, form.scale, Group(8), form.offset, "zero", factor=1 / 127)
    assert "rounds" in refused(scaled)
    index = torch.arange(COLUMNS).flip(0) // 8
    ordered = Affine(form.codes, form.scale, Group(8), form.offset, "zero", index)
    assert "act-order" in refused(ordered)
    low = Affine.quantize(weight(), 4, Group(8), offset="minimum", scale_dtype=torch.float16)
    assert "multiples" in refused(low)
    assert isinstance(form.offset, torch.Tensor)
    half = Affine(form.codes, form.scale, Group(8), form.offset + 0.5, "zero")
    assert "no integers" in refused(half)
    assert "no integers" not in refused(half, zeros="float", bits=(3,))
    assert "even grid" in refused(
        Codebook.quantize(weight(), torch.arange(16.0), 8, bits=4, packing="hi4")
    )


def test_a_group_index_without_meaning_is_dropped() -> None:
    form = made(4, Group(8), False)
    index = torch.arange(COLUMNS) // 8
    ordered = Affine(form.codes, form.scale, Group(8), form.offset, "zero", index)
    found = fit_integers(ordered, bits=(4,), zeros="integer", scales=SCALES)
    assert found.group_index is None and torch.equal(found.dequantize(), form.dequantize())


def test_minima_that_are_multiples_become_zero_points() -> None:
    form = made(4, Group(8), False)
    low = fit_integers(form, bits=(4,), zeros="minimum", scales=(torch.float32,))
    assert low.offset_kind == "minimum"
    again = fit_integers(low, bits=(4,), zeros="integer", scales=SCALES)
    assert isinstance(again.offset, torch.Tensor) and again.offset.dtype == torch.uint8
    assert torch.equal(again.dequantize(), form.dequantize())


def test_nested_scales_become_plain_ones() -> None:
    form = made(4, Group(8), True)
    assert isinstance(form.scale, torch.Tensor)
    inner = Affine.quantize(form.scale.float(), 8, Group(3), offset="minimum")
    nested = Affine(form.codes, inner, Group(8), form.offset, "zero")
    found = fit_integers(nested, bits=(4,), zeros="middle", scales=(torch.float32,))
    assert torch.equal(found.dequantize(), nested.dequantize())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PerTensor(), Channel(0)),
        (PerTensor(), Blocks(2, 8)),
        (Channel(0), Group(8)),
        (Blocks(2, 8), Blocks(1, 8)),
        (Blocks(1, 8), Group(8)),
    ],
    ids=str,
)
def test_narrow_floats_in_smaller_groups(old: Grouping, new: Grouping) -> None:
    values = weight().to(torch.float8_e4m3fn)
    scale = torch.rand(old.scale_shape((ROWS, COLUMNS)))
    form = ScaledFloat(values, scale, old, dtype=torch.float32)
    found = fit_floats(form, values=(torch.float8_e4m3fn,), scales=(torch.float32,), grouping=new)
    assert torch.equal(found.dequantize(), form.dequantize())
    with pytest.raises(QuantmillError):
        fit_floats(form, values=(torch.float8_e5m2,), scales=(torch.float32,))


def test_powers_of_two_are_exact_in_eight_bits_and_back() -> None:
    values = weight().to(torch.float8_e4m3fn)
    scale = torch.tensor([0.25, 1.0, 2.0**-20, 8.0, 1.0, 4.0])
    form = ScaledFloat(values, scale, Channel(0), dtype=torch.float32)
    e8m0 = torch.float8_e8m0fnu
    found = fit_floats(form, values=(torch.float8_e4m3fn,), scales=(e8m0,))
    assert isinstance(found.scale, torch.Tensor) and found.scale.dtype == e8m0
    assert torch.equal(found.dequantize(), form.dequantize())
    other = ScaledFloat(values, scale * 1.5, Channel(0), dtype=torch.float32)
    with pytest.raises(QuantmillError):
        fit_floats(other, values=(torch.float8_e4m3fn,), scales=(e8m0,))


@pytest.mark.parametrize("packing", ["u8", "dense", "hi4", "lo4"])
@pytest.mark.parametrize(
    "grouping", [PerTensor(), Channel(0), Channel(1), Group(8), Flat(6), Flat(7), Blocks(2, 8)]
)
def test_rows_of_a_form_are_rows_of_its_values(packing: str, grouping: Grouping) -> None:
    form = Affine.quantize(weight(), 4, grouping, packing=packing)
    whole = form.dequantize(torch.float32)
    parts = list(float_rows(form, 2))
    assert torch.equal(torch.cat([part for _, part in parts]), whole)
    assert [start for start, _ in parts] == ([0] if grouping == Flat(7) else [0, 2, 4])


def test_rows_of_codebooks_with_nested_scales_and_of_signed_codes() -> None:
    table = torch.linspace(-1, 1, 16)
    book = Codebook.quantize(weight(), table, 8, bits=4, packing="hi4")
    assert isinstance(book.scale, torch.Tensor)
    nested = Codebook(
        book.codes,
        table,
        Codebook.quantize_dynamic(book.scale, torch.linspace(-1, 1, 256), 4),
        Flat(8),
    )
    signed = Affine.quantize_rows_int8(weight())
    floats = ScaledFloat(weight().to(torch.float8_e4m3fn), torch.rand(3, 3), Blocks(2, 8))
    odd = Affine(Codes.pack(torch.ones(3, 5), 3, "dense"), torch.ones(3), Channel(0))
    for form in (book, nested, signed, floats, odd):
        rows = torch.cat([part for _, part in float_rows(form, 2)])
        assert torch.equal(rows, form.dequantize(torch.float32))
