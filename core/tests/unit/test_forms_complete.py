"""Forms over all bits, groupings and offsets; and conversions that keep every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantmill.findings import QuantmillError
from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codes,
    Flat,
    Group,
    Grouping,
    PerTensor,
    ScaledFloat,
    Strided,
)
from quantmill.forms.convert import regroup, scaled_float_to_codebook, to_codebook, to_unsigned

GROUPINGS = [PerTensor(), Channel(0), Channel(1), Group(5), Group(64), Flat(7), Blocks(3, 4)]


@given(bits=st.integers(1, 8), count=st.integers(0, 200), seed=st.integers(0, 99))
def test_dense_streams_are_what_the_documentation_says(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator)
    packed = Codes.pack(codes, bits, "dense")
    assert packed.nbytes == (count * bits + 7) // 8
    assert packed.nbytes == Codes.empty((count,), bits, "dense", "meta").nbytes
    assert torch.equal(packed.unpack().to(torch.int64), codes)
    stream = sum(int(code) << (bits * index) for index, code in enumerate(codes.tolist()))
    assert bytes(packed.data.tolist()) == stream.to_bytes(packed.nbytes, "little")


def test_long_streams_cross_the_chunks_of_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantmill.forms.codes._CHUNK", 64)
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (777,), generator=torch.Generator().manual_seed(bits))
        assert torch.equal(Codes.pack(codes, bits, "dense").unpack().to(torch.int64), codes)


def test_four_bits_dense_is_low_nibble_first() -> None:
    codes = torch.randint(0, 16, (5, 7))
    dense, low = Codes.pack(codes, 4, "dense"), Codes.pack(codes, 4, "lo4")
    assert torch.equal(dense.data, low.data.reshape(-1))
    assert torch.equal(low.repacked("hi4").unpack(), dense.unpack())


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("how", ["amin", "amax"])
def test_reducing_is_the_inverse_of_spreading(grouping: Grouping, how: str) -> None:
    tensor = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    groups = grouping.reduce(tensor, how)
    assert groups.shape == grouping.scale_shape((7, 13))
    spread = grouping.expand(groups, (7, 13)).expand(7, 13)
    assert bool((spread <= tensor).all() if how == "amin" else (spread >= tensor).all())
    hit = (spread == tensor).sum()
    assert hit == groups.numel()


def test_strided_groups_are_hqqs_axis_0() -> None:
    weight = torch.arange(24.0).reshape(4, 6)
    seen = Strided(3).reduce(weight, "amin")
    assert torch.equal(seen, weight.reshape(3, 8).amin(0))
    spread = Strided(3).expand(seen, (4, 6))
    assert torch.equal(spread.reshape(3, 8)[1], weight.reshape(3, 8)[0])
    with pytest.raises(ValueError, match="divide"):
        Strided(5).scale_shape((4, 6))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("offset", ["zero", "minimum"])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_every_value_is_within_half_a_step(
    bits: int, symmetric: bool, offset: str, grouping: Grouping
) -> None:
    weight = torch.randn(7, 13, generator=torch.Generator().manual_seed(bits))
    form = Affine.quantize(weight, bits, grouping, symmetric=symmetric, offset=offset)
    assert isinstance(form.scale, torch.Tensor)
    step = grouping.expand(form.scale, (7, 13))
    error = (form.dequantize(torch.float32) - weight).abs()
    # A zero point is rounded, which may cost another half step at the far end; one symmetric bit
    # has no code above the middle.
    slack = 0.5 if offset == "minimum" and not symmetric else 1.0
    assert bool((error <= step * (slack + 1e-4)).all())


def test_codes_are_chosen_for_the_rounded_scale() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    half = Affine.quantize(weight, 4, Group(32), scale_dtype=torch.float16)
    full = Affine.quantize(weight, 4, Group(32))
    assert isinstance(half.scale, torch.Tensor) and half.scale.dtype == torch.float16
    assert abs(half.dequantize().norm() / full.dequantize().norm() - 1) < 1e-3


def test_scales_and_offsets_may_be_forms() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    plain = Affine.quantize(weight, 4, Group(16), offset="minimum")
    assert isinstance(plain.scale, torch.Tensor) and isinstance(plain.offset, torch.Tensor)
    inner = {
        name: Affine.quantize(value, 6, Group(4), offset="minimum")
        for name, value in (("scale", plain.scale), ("offset", plain.offset))
    }
    nested = Affine(plain.codes, inner["scale"], Group(16), inner["offset"], "minimum")
    assert nested.traits()["nested"]
    expected = Affine(
        plain.codes,
        inner["scale"].dequantize(),
        Group(16),
        inner["offset"].dequantize(),
        "minimum",
    )
    assert torch.equal(nested.dequantize(), expected.dequantize())
    assert (nested.dequantize() - weight).norm() / weight.norm() < 0.15


def _all_codes(bits: int, zero: Any) -> Affine:
    codes = torch.arange(2**bits).repeat(6, 3)
    generator = torch.Generator().manual_seed(bits)
    grouping = Group(2**bits)
    scale = torch.rand(6, 3, generator=generator)
    return Affine(Codes.pack(codes, bits, "dense"), scale, grouping, zero, "zero")


@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_to_codebook_keeps_every_bit_of_every_code(bits: int) -> None:
    form = _all_codes(bits, torch.full((6, 3), float(2 ** (bits - 1))))
    assert torch.equal(to_codebook(form).dequantize(), form.dequantize())


def test_different_zero_points_have_no_codebook() -> None:
    with pytest.raises(QuantmillError):
        to_codebook(_all_codes(3, torch.arange(18.0).reshape(6, 3)))


def test_signed_to_unsigned_keeps_every_bit() -> None:
    codes = torch.arange(-128, 128).to(torch.int8).repeat(3, 1)
    scale = torch.tensor([0.1, 1 / 3, 7.7])
    signed = Affine(Codes(codes, 8, (3, 256), "i8"), scale, Channel(0), factor=1 / 127)
    assert torch.equal(to_unsigned(signed).dequantize(), signed.dequantize())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_pattern_keeps_its_value_in_a_codebook(kind: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).reshape(2, 128).view(kind)
    form = ScaledFloat(values, torch.tensor([0.3, 5.0]), Channel(0), dtype=torch.float32)
    assert torch.equal(
        scaled_float_to_codebook(form).dequantize().nan_to_num(nan=123.0),
        form.dequantize().nan_to_num(nan=123.0),
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PerTensor(), Channel(0)),
        (PerTensor(), Group(5)),
        (Channel(0), Group(4)),
        (Group(8), Group(4)),
        (Group(8), Group(2)),
        (Channel(0), Flat(12)),
        (Blocks(2, 24), Channel(0)),
        (Blocks(3, 6), Group(6)),
    ],
    ids=str,
)
def test_smaller_groups_keep_every_bit(old: Grouping, new: Grouping) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    form = Affine.quantize(weight, 4, old)
    again = regroup(form, new)
    assert again.grouping == new
    assert torch.equal(again.dequantize(), form.dequantize())


@pytest.mark.parametrize(
    ("old", "new"), [(Group(8), Group(3)), (Group(4), Group(8)), (Channel(0), PerTensor())]
)
def test_groups_that_do_not_nest_are_refused(old: Grouping, new: Grouping) -> None:
    form = Affine.quantize(torch.randn(6, 24), 4, old)
    with pytest.raises(QuantmillError) as caught:
        regroup(form, new)
    assert caught.value.findings[0].code == "QM-FORM-001"
