"""Each native quantizer gives the bytes of its plain-torch reference, on every level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantmill.forms import Affine, Codebook, register_table
from quantmill_cpu import native
from quantmill_cpu.quantize import quantize_codebook, quantize_rows_int8

# Tables of the test's own: an ascending one, and one with an order, duplicates and a zero of each
# sign, as FP4 has.
ASCENDING = torch.tensor([-1.0, *[i / 9 - 0.78 for i in range(14)], 1.0])
TURNED = torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25])
TURNED = torch.cat([TURNED, -TURNED])
FINE = torch.tensor(sorted({*[s * 0.97**i for i in range(127) for s in (-1, 1)], 0.0, 1e-6}))
TABLES = {"test-ascending": ASCENDING, "test-turned": TURNED, "test-fine": FINE}
for _name, _table in TABLES.items():
    register_table(_name, lambda table=_table: table)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
GUARD = 0x5A


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[], bool]]:
    """An output between two guards, and whether these are as they were."""
    size, edge = count * dtype.itemsize, 64
    whole = torch.full((size + 2 * edge,), GUARD, dtype=torch.uint8)

    def intact() -> bool:
        return bool((whole[:edge] == GUARD).all() and (whole[edge + size :] == GUARD).all())

    return whole[edge : edge + size].view(dtype), intact


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def codebook(source: Tensor, table: str | Tensor, block: int) -> tuple[int, Tensor, Tensor]:
    count, wide = source.numel(), len(TABLES[table] if isinstance(table, str) else table) == 256
    codes, codes_intact = guarded(count if wide else (count + 1) // 2, torch.uint8)
    scale, scale_intact = guarded(-(-count // block), torch.float32)
    bad = quantize_codebook(source, table=table, block_size=block, out_codes=codes, out_scale=scale)
    assert codes_intact() and scale_intact(), "written beyond an output"
    return bad, codes, scale


def rows_int8(source: Tensor) -> tuple[int, Tensor, Tensor]:
    codes, codes_intact = guarded(source.numel(), torch.int8)
    scale, scale_intact = guarded(source.shape[0], torch.float32)
    bad = quantize_rows_int8(source, out_codes=codes.reshape(source.shape), out_scale=scale)
    assert codes_intact() and scale_intact(), "written beyond an output"
    return bad, codes, scale


KINDS = ["normal", "any bits", "zeros", "zero blocks", "denormal", "huge", "entries", "ties"]


def values(kind: str, count: int, dtype: torch.dtype, seed: int, table: Tensor) -> Tensor:
    """Finite values of one kind."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: Tensor) -> Tensor:
        return choices[torch.randint(0, len(choices), (count,), generator=generator)]

    found = torch.randn(count, generator=generator)
    signs = pick(torch.tensor([-1.0, 1.0]))
    if kind == "any bits":
        wide = torch.int32 if dtype == torch.float32 else torch.int16
        limits = torch.iinfo(wide)
        raw = torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=wide)
        return raw.view(dtype).nan_to_num(0.0, 0.0, 0.0)
    if kind == "zeros":
        found = signs * 0.0
    elif kind == "zero blocks":
        found = found * ((torch.arange(count) // 32) % 3 == 1)
    elif kind == "denormal":
        info = torch.finfo(dtype)
        found = signs * (torch.arange(count) % 5) * (info.tiny * info.eps)
    elif kind == "huge":
        found = signs * torch.finfo(dtype).max * pick(torch.tensor([1.0, 0.5, 0.99, 0.0]))
    elif kind in ("entries", "ties"):
        # An absmax that is a power of two scales exactly: values are on entries, or in the middle.
        ordered = table.sort().values
        near = pick(ordered) if kind == "entries" else pick((ordered[1:] + ordered[:-1]) / 2)
        found = torch.where(torch.arange(count) % 32 == 0, 1.0, near) * 2.0 ** (seed % 9 - 4)
    return found.to(dtype).nan_to_num(0.0)


CASES = {
    "kind": st.sampled_from(KINDS),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**31),
    "count": st.one_of(st.integers(1, 700), st.sampled_from([4095, 4096, 4097, 8193, 12345])),
    "block": st.sampled_from(BLOCKS),
    "number": st.sampled_from([1, 2, 7]),
}


@settings(deadline=None, max_examples=150)
@given(table=st.sampled_from(["test-ascending", "test-turned"]), named=st.booleans(), **CASES)
def test_four_bits_are_the_reference_bit_for_bit(
    table: str, named: bool, kind: str, dtype: Any, seed: int, count: int, block: int, number: int
) -> None:
    source = values(kind, count, dtype, seed, TABLES[table])
    form = Codebook.quantize(source, TABLES[table], block, bits=4, packing="hi4")
    assert isinstance(form.scale, Tensor)
    for level in native.levels():
        native.use_level(level)
        with threads(number):
            bad, codes, scale = codebook(source, table if named else TABLES[table], block)
        assert bad == -1
        assert bits(codes) == bits(form.codes.data), level
        assert bits(scale) == bits(form.scale), level


@pytest.mark.parametrize("level", native.levels())
def test_full_blocks_multiply_by_the_reciprocal_and_a_ragged_one_divides(level: str) -> None:
    # Values on a bound but for the last bit, where the two ways of scaling give different codes.
    native.use_level(level)
    bound = (ASCENDING[9] + ASCENDING[10]) / 2
    tops = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.5
    near = tops * bound
    multiplied, divided = near * (1.0 / tops) > bound, near / tops > bound
    pairs = torch.stack([tops, near], dim=1)[multiplied != divided][:50]
    assert len(pairs) == 50
    wanted = 10 * divided[multiplied != divided][:50] + 9 * ~divided[multiplied != divided][:50]
    for pair, ragged in zip(pairs, wanted.tolist(), strict=True):
        _, codes, _ = codebook(pair.clone(), ASCENDING, 64)
        assert codes.tolist() == [15 << 4 | ragged]
        _, codes, _ = codebook(pair.clone(), ASCENDING, 2)
        assert codes.tolist() == [15 << 4 | 19 - ragged]


def reference_8bit(source: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The core's reference; what it leaves open is as in bitsandbytes: in a block whose absmax has
    no finite reciprocal, positive values get the last code, all others the first."""
    count = source.numel()
    blocks = torch.nn.functional.pad(source, (0, -count % block)).reshape(-1, block)
    absmax = blocks.abs().amax(dim=1)
    tiny = torch.isinf(1.0 / absmax).unsqueeze(1)
    form = Codebook.quantize_dynamic(blocks.masked_fill(tiny, 0.0).reshape(-1), table, block)
    extreme = torch.where(blocks > 0, 255, 0).to(torch.uint8)
    codes = torch.where(tiny, extreme, form.codes.data.reshape(blocks.shape))
    return codes.reshape(-1)[:count], absmax


@settings(deadline=None, max_examples=80)
@given(named=st.booleans(), **CASES)
def test_eight_bits_are_the_reference_bit_for_bit(
    named: bool, kind: str, dtype: Any, seed: int, count: int, block: int, number: int
) -> None:
    source = values(kind, count, dtype, seed, FINE).to(torch.float32)
    wanted_codes, wanted_scale = reference_8bit(source, FINE, block)
    for level in native.levels():
        native.use_level(level)
        with threads(number):
            bad, codes, scale = codebook(source, "test-fine" if named else FINE, block)
        assert bad == -1
        assert bits(codes) == bits(wanted_codes), level
        assert bits(scale) == bits(wanted_scale), level


@settings(deadline=None, max_examples=150)
@given(rows=st.integers(1, 9), **CASES)
def test_int8_rows_are_the_reference_bit_for_bit(
    rows: int, kind: str, dtype: Any, seed: int, count: int, block: int, number: int
) -> None:
    columns = max(1, count // rows)
    halves = torch.cat([torch.arange(-126.5, 127.0), torch.tensor([127.0])]) / 127.0
    source = values(kind, rows * columns, dtype, seed, halves).reshape(rows, columns)
    if kind == "ties":
        source = (source * 127.0).to(dtype)
    source = source.clamp(-65280.0, 65280.0)  # what binary16 holds, in each dtype
    form = Affine.quantize_rows_int8(source.to(torch.float16))
    assert isinstance(form.scale, Tensor)
    for level in native.levels():
        native.use_level(level)
        with threads(number):
            bad, codes, scale = rows_int8(source)
        assert bad == -1
        assert bits(codes) == bits(form.codes.data), level
        assert bits(scale) == bits(form.scale), level


@pytest.mark.parametrize("level", native.levels())
def test_every_bfloat16_and_float16_is_read_exactly(level: str) -> None:
    native.use_level(level)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        source = patterns.view(dtype)
        source = source[source.isfinite()].repeat_interleave(2)  # each in a block of its own
        _, _, scale = codebook(source, ASCENDING, 2)
        assert torch.equal(scale, source[::2].to(torch.float32).abs())


@pytest.mark.parametrize("level", native.levels())
def test_float32_is_rounded_to_float16_as_torch_does(level: str) -> None:
    native.use_level(level)
    halves = torch.arange(0, 0x7BFF, dtype=torch.int16).view(torch.float16).to(torch.float32)
    middle = (halves[1:] + halves[:-1]) / 2  # ties, and their neighbours on both sides
    nearby = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, 1e9)]
    source = torch.cat([halves, middle, *nearby, torch.tensor([65519.99])]).reshape(-1, 1)
    bad, _, scale = rows_int8(source)
    assert bad == -1
    assert torch.equal(scale, source[:, 0].to(torch.float16).to(torch.float32))


BAD = [float("nan"), float("inf"), float("-inf")]
PLACES = st.lists(st.tuples(st.integers(0, 9999), st.sampled_from(BAD)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=100)
@given(
    places=PLACES,
    count=st.integers(1, 10000),
    size=st.sampled_from([2, 64, 4096, 6000]),
    dtype=st.sampled_from(DTYPES),
    number=st.sampled_from([1, 2, 7]),
)
def test_the_first_value_that_is_not_finite_is_found(
    places: list[tuple[int, float]], count: int, size: int, dtype: Any, number: int
) -> None:
    source = values("normal", count, dtype, 1, ASCENDING)
    for place, value in places:
        source[place % count] = value
    first = min(place % count for place, _ in places)
    for level in native.levels():
        native.use_level(level)
        with threads(number):
            assert codebook(source, TURNED, size)[0] == first
            assert codebook(source.float(), FINE, size)[0] == first
            wide = source[: count // 7 * 7].reshape(-1, 7)
            assert rows_int8(wide)[0] == (first if first < wide.numel() else -1)


@pytest.mark.parametrize(("value", "found"), [(65519.0, -1), (65520.0, 5), (-1e30, 5)])
def test_int8_refuses_what_overflows_in_float16(value: float, found: int) -> None:
    source = torch.ones(2, 4)
    source[1, 1] = value
    assert rows_int8(source)[0] == found


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_gives_nothing(dtype: torch.dtype) -> None:
    assert codebook(torch.empty(0, dtype=dtype), ASCENDING, 64)[0] == -1
    assert codebook(torch.empty(0), FINE, 64)[0] == -1
    assert rows_int8(torch.empty(0, 7, dtype=dtype))[0] == -1
    bad, _, scale = rows_int8(torch.empty(3, 0, dtype=dtype))
    assert bad == -1 and scale.tolist() == [0.0, 0.0, 0.0]


def test_many_threads_and_little_work() -> None:
    for count in (1, 2, 64, 65, 200):
        source = values("normal", count, torch.float32, count, ASCENDING)
        with threads(1):
            alone = codebook(source, ASCENDING, 64), rows_int8(source.reshape(1, -1))
        with threads(200):
            many = codebook(source, ASCENDING, 64), rows_int8(source.reshape(1, -1))
        for one, other in zip(alone, many, strict=True):
            assert [bits(tensor) for tensor in one[1:]] == [bits(tensor) for tensor in other[1:]]


def test_an_unaligned_source_is_read() -> None:
    # A tensor of a mapped file starts anywhere.
    source = values("normal", 1000, torch.float32, 3, ASCENDING)
    for dtype in DTYPES:
        apart = bytearray(1) + bytearray(bits(source.to(dtype)))
        unaligned = torch.frombuffer(apart, dtype=dtype, offset=1)
        assert unaligned.data_ptr() % 2 == 1
        for table in (ASCENDING, FINE):
            if table is FINE and dtype != torch.float32:
                continue
            one, other = (codebook(item, table, 64) for item in (source.to(dtype), unaligned))
            assert [bits(tensor) for tensor in one[1:]] == [bits(tensor) for tensor in other[1:]]


def good() -> dict[str, Any]:
    return {
        "block": torch.ones(100),
        "table": ASCENDING,
        "block_size": 64,
        "out_codes": torch.empty(50, dtype=torch.uint8),
        "out_scale": torch.empty(2),
    }


WRONG = {
    "block, not contiguous": {"block": torch.ones(200)[::2]},
    "block, float64": {"block": torch.ones(100, dtype=torch.float64)},
    "block, integer": {"block": torch.ones(100, dtype=torch.int32)},
    "block, no data": {"block": torch.ones(100, device="meta")},
    "block, sparse": {"block": torch.ones(100).to_sparse()},
    "codes too short": {"out_codes": torch.empty(49, dtype=torch.uint8)},
    "codes too long": {"out_codes": torch.empty(51, dtype=torch.uint8)},
    "codes of the wrong dtype": {"out_codes": torch.empty(50, dtype=torch.int8)},
    "codes, not contiguous": {"out_codes": torch.empty(100, dtype=torch.uint8)[::2]},
    "scale too short": {"out_scale": torch.empty(1)},
    "scale too long": {"out_scale": torch.empty(3)},
    "scale of the wrong dtype": {"out_scale": torch.empty(2, dtype=torch.float16)},
    "odd block": {"block_size": 63},
    "no block": {"block_size": 0},
    "negative block": {"block_size": -64},
    "table too short": {"table": ASCENDING[:15]},
    "table too long": {"table": torch.linspace(-1, 1, 255)},
    "table of the wrong dtype": {"table": ASCENDING.to(torch.bfloat16)},
    "wide table, not ascending": {
        "table": FINE.flip(0),
        "out_codes": torch.empty(100, dtype=torch.uint8),
    },
    "wide table, codes too short": {"table": FINE},
    "wide table, half precision": {
        "table": FINE,
        "block": torch.ones(100, dtype=torch.float16),
        "out_codes": torch.empty(100, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused(what: str) -> None:
    assert quantize_codebook(**good()) == -1
    with pytest.raises(ValueError, match=r"must|need"):
        quantize_codebook(**{**good(), **WRONG[what]})


WRONG_ROWS = {
    "one dimension": {"block": torch.ones(12)},
    "three dimensions": {"block": torch.ones(1, 3, 4)},
    "not contiguous": {"block": torch.ones(4, 3).t()},
    "float64": {"block": torch.ones(3, 4, dtype=torch.float64)},
    "codes too short": {"out_codes": torch.empty(3, 3, dtype=torch.int8)},
    "codes of the wrong dtype": {"out_codes": torch.empty(3, 4, dtype=torch.uint8)},
    "codes, not contiguous": {"out_codes": torch.empty(4, 3, dtype=torch.int8).t()},
    "scale too short": {"out_scale": torch.empty(2)},
    "scale of the wrong dtype": {"out_scale": torch.empty(3, dtype=torch.float64)},
}


@pytest.mark.parametrize("what", WRONG_ROWS)
def test_wrong_rows_are_refused(what: str) -> None:
    right = {
        "block": torch.ones(3, 4),
        "out_codes": torch.empty(3, 4, dtype=torch.int8),
        "out_scale": torch.empty(3),
    }
    assert quantize_rows_int8(**right) == -1
    with pytest.raises(ValueError, match="must"):
        quantize_rows_int8(**{**right, **WRONG_ROWS[what]})
