"""The native matmul kernels against float64, on every level; and layouts that give forms back."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantmill.forms import Channel, Codebook, Codes, Flat, Form, Group, PerTensor
from quantmill_cpu import native
from quantmill_cpu.codes import pack_codes, unpack_codes
from quantmill_cpu.dequantize import dequantize
from quantmill_cpu.layout import misfit
from quantmill_cpu.matmul import _product, matmul
from quantmill_cpu.operators import implement, torch_library


def _forms() -> Any:
    """matmul_forms.py beside this file, which the program for the sanitizers uses too."""
    name = "quantmill_cpu_matmul_forms"
    if name not in sys.modules:
        path = Path(__file__).with_name("matmul_forms.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


forms = _forms()
Make, error, prepared, same = forms.Make, forms.error, forms.prepared, forms.same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = list(native.matmul_levels())
MOST = 0.002
"""The largest relative error that a kernel may have, before its result is rounded."""


@pytest.fixture(autouse=True)
def _best_level() -> Iterator[None]:
    yield
    native.use_matmul_level("")


def draw(batch: int, width: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(form: Form, batches: tuple[int, ...] = (1, 3, 20), levels: list[str] = LEVELS) -> None:
    live = prepared(form)
    assert misfit(form) is None and "weight" in live.tensors
    planned = prepared(form.to("meta")).nbytes
    # Where strides don't say so, only data tell that all zero points are the same.
    told = "offset_value" in live.tensors and any(form.to("meta").offset.stride())
    assert planned > live.nbytes if told else planned == live.nbytes
    assert same(live.restore(), form)
    weight = form.dequantize(torch.float32)
    # Tables and scaled weights are rounded to bfloat16: few of them are no average.
    most = MOST if weight.numel() >= 500 else 2 * MOST
    for level in levels:
        native.use_matmul_level(level)
        for dtype in DTYPES:
            assert forms.expanded(dequantize(live, dtype), form), f"{level}, {dtype}"
        for batch in batches:
            for dtype in DTYPES:
                x, bias = draw(batch, form.shape[1], dtype), draw(1, form.shape[0], dtype)[0]
                y = matmul(x, live, bias)
                assert y.dtype == dtype and y.shape == (batch, form.shape[0])
                wrong = error(y, x, weight, bias)
                assert wrong <= most, f"{level}, {dtype}, batch {batch}: {wrong}"


@pytest.mark.parametrize("bits", forms.BITS)
@pytest.mark.parametrize("offset", ["none", "zero", "minimum"])
def test_every_width_and_offset(bits: int, offset: str) -> None:
    packing = "i8" if offset == "none" else "dense"
    check(Make(bits).affine((40, 256), bits, Group(64), offset=offset, packing=packing))


@pytest.mark.parametrize("name", list(forms.various(Make(0))))
def test_special_forms(name: str) -> None:
    check(forms.various(Make(3))[name], batches=(1, 2, 7, 40, 70))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65, 129, 300])
def test_batches(level: str, batch: int) -> None:
    for form in (
        Make(1).affine((48, 128), 4, Group(32)),
        Make(2).affine((17, 112), 3, Group(16), offset="minimum"),
        Make(3).codebook((20, 600), 4, Channel(0)),
    ):
        check(form, (batch,), [level])


groupings = st.one_of(
    st.integers(1, 24).map(lambda units: Group(16 * units)),
    st.just(Channel(0)),
    st.just(PerTensor()),
)


@settings(max_examples=60)
@given(
    bits=st.sampled_from(forms.BITS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    grouping=groupings,
    packing=st.sampled_from(["u8", "i8", "dense", "hi4", "lo4"]),
    offset=st.sampled_from(["none", "zero", "minimum"]),
    scale_dtype=st.sampled_from(DTYPES),
    offset_dtype=st.sampled_from([torch.uint8, torch.int8, torch.int32, *DTYPES]),
    act_order=st.booleans(),
    batch=st.integers(1, 40),
    seed=st.integers(0, 1000),
    level=st.sampled_from(LEVELS),
)
def test_affine_of_any_shape(
    bits: int,
    rows: int,
    columns: int,
    packing: str,
    offset_dtype: torch.dtype,
    batch: int,
    seed: int,
    level: str,
    **more: Any,
) -> None:
    if packing in ("hi4", "lo4"):
        bits = 4
    if bits == 8 and offset_dtype == torch.int8:
        offset_dtype = torch.uint8
    form = Make(seed).affine(
        (rows, columns), bits, packing=packing, offset_dtype=offset_dtype, **more
    )
    check(form, (batch,), [level])


@settings(max_examples=40)
@given(
    bits=st.sampled_from(forms.BITS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 20),
    block=st.sampled_from([16, 32, 48, 64]),
    nested=st.booleans(),
    batch=st.integers(1, 40),
    seed=st.integers(0, 1000),
    level=st.sampled_from(LEVELS),
)
def test_codebooks_of_any_shape(
    bits: int, rows: int, columns: int, block: int, nested: bool, batch: int, seed: int, level: str
) -> None:
    packing = "dense" if bits != 4 else ("hi4", "lo4", "u8")[seed % 3]
    shape = (rows, columns * block)
    form = Make(seed).codebook(shape, bits, Flat(block), packing=packing, nested=nested)
    check(form, (batch,), [level])


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (Make(1).codebook((9, 63), 4, Flat(64)), "blocks of 64 that cross rows of 63"),
        (Make(1).affine((9, 63), 4, Group(20)), "groups of 20 columns"),
        (Make(1).affine((9, 64), 7, Group(32)), "7 bits"),
        (Make(1).affine((9, 64), 4, Channel(1)), "the grouping Channel"),
        (
            replace(
                Make(1).affine((9, 64), 4, Group(32)),
                group_index=torch.arange(64).remainder(3).clamp(max=1),
            ),
            "groups of unequal sizes",
        ),
    ],
)
def test_what_has_no_panels_is_kept_and_computed_by_the_reference(form: Form, why: str) -> None:
    found = misfit(form)
    assert found is not None and why in found
    live = prepared(form)
    assert live.nbytes == form.nbytes and same(live.restore(), form)
    x = draw(3, form.shape[1], torch.float32)
    assert torch.equal(matmul(x, live, None), form.matmul(x))


@pytest.mark.parametrize("level", LEVELS)
def test_no_rows_and_more_axes(level: str) -> None:
    native.use_matmul_level(level)
    live = prepared(Make(1).affine((40, 64), 4, Group(32)))
    assert matmul(torch.empty(0, 64), live, None).shape == (0, 40)
    x = draw(24, 64, torch.bfloat16).reshape(2, 3, 4, 64)
    y = matmul(x, live, None)
    assert y.shape == (2, 3, 4, 40)
    # A row's result doesn't depend on which rows come with it in groups of as many rows.
    assert torch.equal(matmul(x.transpose(0, 2), live, None), y.transpose(0, 2))
    assert torch.equal(matmul(x[0, 0, 0], live, None), matmul(x[:1, 0, 0], live, None)[0])


def unaligned(tensor: Tensor) -> Tensor:
    """The same values at an odd address."""
    raw = bytearray(tensor.numel() * tensor.itemsize + 1)
    apart = torch.frombuffer(raw, dtype=tensor.dtype, offset=1, count=tensor.numel())
    return apart.copy_(tensor.reshape(-1)).reshape(tensor.shape)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_need_not_be_aligned(level: str, dtype: torch.dtype) -> None:
    native.use_matmul_level(level)
    form = Make(1).affine((40, 96), 5, Group(32))
    live, x, bias = prepared(form), draw(6, 96, dtype), draw(1, 40, dtype)[0]
    away = prepared(form.map_tensors(unaligned))
    assert same(away.restore(), form)
    for count in (1, 6):
        expected = matmul(x[:count], live, bias)
        assert torch.equal(matmul(unaligned(x[:count]), away, unaligned(bias)), expected)
    odd = replace(live, tensors={"weight": unaligned(live.tensors["weight"])})
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        matmul(x, odd, bias)


def from_file(form: Form, path: Path) -> Form:
    mapped = load_file(path)
    names = iter(form.tensors())
    return form.map_tensors(lambda _: mapped[next(names)])


def test_forms_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    form = Make(1).codebook((40, 128), 4, Flat(64), nested=True)
    path = tmp_path / "weight.safetensors"
    save_file({"head": torch.zeros(3, dtype=torch.uint8), **form.tensors()}, path)
    live = prepared(from_file(form, path))
    path.unlink()
    x = draw(2, 128, torch.bfloat16)
    assert torch.equal(matmul(x, live, None), matmul(x, prepared(form), None))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 6, 40])
def test_activations_far_apart_and_not_finite(level: str, batch: int) -> None:
    native.use_matmul_level(level)
    form = Make(1).affine((40, 640), 4, Channel(0))
    live, weight = prepared(form), form.dequantize(torch.float32)
    x = draw(batch, 640, torch.float32)
    x[:, 5] = 1e4
    x[:, 300:] *= 1e-5
    assert error(matmul(x, live, None), x, weight) <= MOST
    assert torch.equal(matmul(x * 0, live, None), torch.zeros(batch, 40))
    for value in (float("nan"), float("inf"), -float("inf")):
        odd = x.clone()
        odd[0, 77] = value
        y = matmul(odd, live, None)
        assert not y[0].isfinite().any()
        assert error(y[1:], odd[1:], weight) <= MOST


@pytest.mark.parametrize("level", LEVELS)
def test_weights_that_are_not_finite_spoil_their_row_only(level: str) -> None:
    native.use_matmul_level(level)
    form = Make(1).float8((20, 40), torch.float8_e4m3fn, Channel(0))
    form.values.view(torch.uint8)[3, 7] = 0x7F
    for batch in (1, 6):
        y = matmul(draw(batch, 40, torch.float32), prepared(form), None)
        assert y[:, 3].isnan().all() and y[:, [*range(3), *range(4, 20)]].isfinite().all()
    # Padding is of a code whose value is finite.
    table = torch.linspace(-1, 1, 16)
    table[0] = float("inf")
    codes = Codes.pack(torch.full((5, 40), 3, dtype=torch.uint8), 4, "hi4")
    odd = Codebook(codes, table, torch.ones(5), Channel(0))
    x = draw(2, 40, torch.float32)
    assert error(matmul(x, prepared(odd), None), x, odd.dequantize(torch.float32)) <= MOST


def test_any_number_of_threads_gives_the_same() -> None:
    form = Make(1).affine((600, 512), 4, Group(64))
    live = prepared(form)
    before = torch.get_num_threads()
    for batch in (1, 20):
        x = draw(batch, 512, torch.bfloat16)
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(matmul(x, live, None))
            assert same(prepared(form).restore(), form)
        torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def own_threads() -> Iterator[None]:
    """The library's own threads in place of PyTorch's."""
    torch_library().qm_borrow_threads(None)
    yield
    torch_library.cache_clear()
    torch_library()


@pytest.mark.usefixtures("own_threads")
def test_the_librarys_own_threads_give_the_same() -> None:
    test_any_number_of_threads_gives_the_same()
    test_several_python_threads_at_once()


@pytest.mark.usefixtures("own_threads")
def test_after_a_fork_threads_are_started_anew() -> None:
    live = prepared(Make(1).affine((600, 512), 4, Group(64)))
    x = draw(1, 512, torch.bfloat16)
    expected = matmul(x, live, None)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(matmul(x, live, None), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_several_python_threads_at_once() -> None:
    live = prepared(Make(1).affine((600, 512), 4, Group(64)))
    xs = [draw(batch, 512, torch.bfloat16, batch) for batch in (1, 2, 9, 33) * 8]
    expected = [matmul(x, live, None) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda x: matmul(x, live, None), xs)
            assert all(map(torch.equal, results, expected))


def test_wrong_tensors_are_refused() -> None:
    live = prepared(Make(1).affine((40, 64), 4, Group(32)))
    for x in (torch.randn(1, 63), torch.randn(1, 64).double(), torch.randn(1, 64, device="meta")):
        with pytest.raises(ValueError, match="x must be float32"):
            matmul(x, live, None)
    for bias in (torch.randn(39), torch.randn(40).bfloat16()):
        with pytest.raises(ValueError, match="bias must be"):
            matmul(torch.randn(1, 64), live, bias)


def test_it_compiles_without_a_graph_break() -> None:
    live = prepared(Make(1).affine((40, 64), 4, Group(32)))

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(matmul(x, live, None)) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = draw(batch, 64, torch.float32)
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_takes_any_strides_and_dimensions(bias: bool) -> None:
    live = prepared(Make(1).affine((40, 64), 4, Group(32)))
    weight, more = live.tensors["weight"], draw(1, 40, torch.bfloat16)[0] if bias else None
    wide = draw(6, 256, torch.bfloat16).reshape(2, 3, 256)
    name = "product_bias" if bias else "product"
    operator = getattr(torch.ops.quantmill_cpu, name).default
    for x in (
        wide[..., :64],
        wide[..., ::4],
        wide[..., :64].transpose(0, 1),
        wide[0, 0, 3:67],
        wide[:0, :, :64],
        wide[..., :64].expand(4, 2, 3, 64),
    ):
        expected = matmul(x.contiguous(), live, more)
        found = operator(x, weight, 40, 64, *([more] if bias else []))
        assert torch.equal(found, expected) and found.is_contiguous()
        # What it is where PyTorch offers no C functions for operators.
        assert torch.equal(_product(x, weight, 40, 64, more), expected)


def test_an_operator_made_by_a_pytorch_without_its_functions_is_pythons() -> None:
    class Without:
        pass

    assert not implement(native.library(), cast(Any, Without()))


def test_the_layout_takes_hardly_more_than_the_form() -> None:
    shape = (4096, 4096)
    groups = Group(32).scale_shape(shape)
    for bits in forms.BITS:
        codes = Codes.empty(shape, bits, "dense", "meta")
        scale = torch.empty(groups, dtype=torch.float16, device="meta")
        zero = torch.empty(groups, dtype=torch.uint8, device="meta")
        form = forms.Affine(codes, scale, Group(32), zero, "zero")
        assert form.nbytes <= prepared(form).nbytes <= form.nbytes * 1.001


def test_levels() -> None:
    assert list(native.levels()) == LEVELS[: len(native.levels())]
    for name in native.levels():
        native.use_level(name)
        best = LEVELS[-1] if name == native.levels()[-1] else name
        assert native.matmul_level() == best
    for name in LEVELS:
        native.use_matmul_level(name)
        assert native.matmul_level() == name
    with pytest.raises(ValueError, match="'sse9' is none of"):
        native.use_matmul_level("sse9")


@given(
    bits=st.integers(1, 8),
    count=st.integers(0, 300),
    packing=st.sampled_from(["u8", "dense", "hi4", "lo4"]),
)
def test_codes_are_packed_as_forms_pack_them(bits: int, count: int, packing: str) -> None:
    bits = 4 if packing in ("hi4", "lo4") else bits
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)
    expected, packed = Codes.pack(codes, bits, packing), pack_codes(codes, bits, packing)
    assert torch.equal(packed.data, expected.data) and packed.packing == packing
    assert torch.equal(unpack_codes(expected), codes)
