"""The kernels of :class:`ByteRounding` and :class:`CodeRounding` give the bytes of plain torch, on
every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantmill.kernels import KernelRegistry
from quantmill.rounding import BYTES, ByteRounding, CodeRounding
from quantmill_cpu import native
from quantmill_cpu.plugin import quantmill_kernels
from quantmill_cpu.quantize import round_bytes, round_codes

KINDS = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
PAIRS = torch.float4_e2m1fn_x2
CPU = torch.device("cpu")


def pair(dtype: torch.dtype, kind: torch.dtype) -> tuple[ByteRounding, ByteRounding]:
    """By the kernels, and in plain torch."""
    mine, plain = (
        ByteRounding(KernelRegistry(kernels), CPU, dtype, kind)
        for kernels in (quantmill_kernels(), [])
    )
    return mine, plain


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 7),
    st.integers(1, 5),
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from(native.levels()),
)
def test_rounding_is_that_of_torch(
    seed: int,
    rows: int,
    columns: int,
    group: int,
    name: str,
    kind: torch.dtype,
    multiply: bool,
    level: str,
) -> None:
    native.use_level(level)
    dtype: torch.dtype = getattr(torch, name)
    torch.manual_seed(seed)
    block = (torch.randn(rows, columns) * 10.0 ** torch.randint(-6, 4, (rows, 1))).to(dtype)
    mine, plain = pair(dtype, kind)
    found = mine.absmax(block, group)
    assert torch.equal(found, plain.absmax(block, group))
    by = (found / BYTES[kind]).clamp(min=1e-12)
    by = 1.0 / by if multiply else by
    top = 63.0 if kind == torch.int8 and seed % 2 else None
    outs = [torch.empty(rows, columns, dtype=kind) for _ in range(2)]
    for rounding, out in zip((mine, plain), outs, strict=True):
        rounding.store(block, by, out, group, multiply=multiply, top=top)
    assert same(*outs)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 7),
    st.integers(1, 9),
    st.integers(1, 2500),
    st.sampled_from([2, 16, 32, 4098]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(native.levels()),
)
def test_pairs_are_those_of_torch(
    seed: int, rows: int, half: int, group: int, name: str, level: str
) -> None:
    native.use_level(level)
    torch.manual_seed(seed)
    block = (torch.randn(rows, 2 * half) * 10.0 ** torch.randint(-6, 4, (rows, 1))).to(
        getattr(torch, name)
    )
    mine, plain = pair(block.dtype, PAIRS)
    by = (mine.absmax(block, group) / 6.0).clamp(min=1e-12) * (0.5 if seed & 1 else 1.0)
    outs = [torch.empty(rows, half, dtype=torch.uint8).view(PAIRS) for _ in range(2)]
    for rounding, out in zip((mine, plain), outs, strict=True):
        rounding.store(block, by, out, group)
    assert same(*outs)


@pytest.mark.parametrize("level", native.levels())
def test_every_step_of_4_bits_and_its_middles(level: str) -> None:
    native.use_level(level)
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middles = (steps[1:] + steps[:-1]) / 2
    # The even code of the two; then what is just above and just below.
    values = torch.cat(
        [steps, middles, torch.nextafter(middles, steps[1:]), torch.nextafter(middles, steps[:-1])]
    )
    wanted = [*range(8), 0, 2, 2, 4, 4, 6, 6, *range(1, 8), *range(7), 7, 7]
    block = torch.cat([values, torch.tensor([7.0, 1e30])])
    block = torch.cat([block, -block]).reshape(1, -1)
    out = torch.empty(1, block.numel() // 2, dtype=torch.uint8).view(PAIRS)
    pair(torch.float32, PAIRS)[0].store(block, torch.ones(1, 1), out, block.numel())
    packed = out.view(torch.uint8)[0]
    codes = torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1).tolist()
    assert codes == [*wanted, *(8 + code for code in wanted)]


def coders(dtype: torch.dtype, bits: int) -> tuple[CodeRounding, CodeRounding]:
    mine, plain = (
        CodeRounding(KernelRegistry(kernels), CPU, dtype, bits)
        for kernels in (quantmill_kernels(), [])
    )
    return mine, plain


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 31),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([1, 2, 7, 32, 128, 1000, 4096, 5000]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(1, 8),
    st.sampled_from(native.levels()),
)
def test_codes_are_those_of_torch(
    seed: int, rows: int, groups: int, group: int, name: str, bits: int, level: str
) -> None:
    native.use_level(level)
    dtype: torch.dtype = getattr(torch, name)
    torch.manual_seed(seed)
    block = torch.randn(rows, groups * group) * 10.0 ** torch.randint(-4, 4, (rows, 1))
    block = (block + (seed & 1)).to(dtype)
    mine, plain = coders(dtype, bits)
    low, high = mine.extremes(block, group)
    assert all(map(torch.equal, (low, high), plain.extremes(block, group)))
    by = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    middle = 2 ** (bits - 1)
    how = {
        "minus": low / by if seed & 2 else None,
        "plus": torch.round(low / -by).clamp(-9, 9) if seed & 4 else None,
        "multiply": bool(seed & 8),
        "middle": middle if seed & 16 else 0,
        "limits": (middle // 2, middle) if seed & 8 else None,
        "lowest": not seed & 4,
    }
    by = 1.0 / by if seed & 8 else by
    outs = [torch.zeros(-(-block.numel() * bits // 8) + 1, dtype=torch.uint8) for _ in range(2)]
    for rounding, out in zip((mine, plain), outs, strict=True):
        rounding.store(block, by, out, group, **how)  # type: ignore[arg-type]
    assert torch.equal(*outs)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 4095, 4999])
def test_extremes_tell_what_is_not_finite(bad: float, where: int) -> None:
    block = torch.zeros(2, 10000)
    block[1, where] = bad
    for rounding in coders(torch.float32, 4):
        low, high = rounding.extremes(block, 5000)
        assert (high - low).isfinite().tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", native.levels())
def test_every_step_of_a_format_and_its_middles(kind: torch.dtype, level: str) -> None:
    native.use_level(level)
    steps = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(kind).to(torch.float32)
    steps = steps[steps.isfinite()].sort().values
    middles = (steps[1:] + steps[:-1]) / 2
    edges = [torch.nextafter(middles, middles + sign) for sign in (-1.0, 1.0)]
    beyond = torch.tensor([1e6, -1e6, 1e-30, -1e-30, -0.0])
    block = torch.cat([steps, middles, *edges, beyond]).reshape(1, -1)
    mine, plain = pair(torch.float32, kind)
    outs = [torch.empty(block.shape, dtype=kind) for _ in range(2)]
    for rounding, out in zip((mine, plain), outs, strict=True):
        rounding.store(block, torch.ones(1, 1), out, block.shape[1])
    assert same(*outs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_absmax_tells_what_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    block = torch.zeros(3, 70, dtype=dtype)
    block[1, 65] = bad
    for rounding in pair(dtype, torch.int8):
        assert rounding.absmax(block, 32).isfinite().tolist() == [
            [True] * 3,
            [True, True, False],
            [True] * 3,
        ]


def test_what_the_library_may_not_touch_is_refused() -> None:
    block, by, out = torch.zeros(2, 8), torch.ones(2, 1), torch.empty(2, 8, dtype=torch.int8)

    def call(**other: object) -> None:
        given: dict[str, object] = {"by": by, "out": out, "group": 8, "multiply": False, "top": 127}
        round_bytes(block, **(given | other))  # type: ignore[arg-type]

    call()
    for other in ({"group": 4}, {"group": 0}, {"top": 128.0}, {"by": by.double()}):
        with pytest.raises(ValueError, match=r"must|within"):
            call(**other)
    with pytest.raises(ValueError, match="out must be"):
        call(out=out[:1])

    packed = torch.empty(8, dtype=torch.uint8)

    def codes(**other: object) -> None:
        given: dict[str, object] = {
            "by": by,
            "minus": None,
            "plus": None,
            "out": packed,
            "group": 8,
        }
        given |= {"multiply": False, "bits": 4, "middle": 8.0, "edge": 0.0, "limits": (0, 15)}
        round_codes(block, **(given | other))  # type: ignore[arg-type]

    codes()
    for other in ({"minus": by[:1]}, {"plus": by.half()}, {"bits": 9}, {"limits": (0, 16)}):
        with pytest.raises(ValueError, match=r"must|bits"):
            codes(**other)
    with pytest.raises(ValueError, match="out must be"):
        codes(out=packed[:7])
