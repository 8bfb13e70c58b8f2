"""Every kernel against its form's reference, on the GPU or under Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codebook,
    Form,
    Group,
    Grouping,
    PerTensor,
    ScaledFloat,
)
from quantmill.kernels import KernelRegistry, Prepared
from quantmill.linear import FormLinear
from quantmill.registrations import resolve
from quantmill_triton.plugin import quantmill_kernels

BATCHES = (0, 1, 3, 13, 17)
TABLE = torch.linspace(-1, 1, 16) ** 3
DYNAMIC = torch.linspace(-1, 1, 256) ** 3

# Mean error over the mean of the result, against float64. Weights and results are rounded.
BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 1e-5}


def kernel_for(operation: str, form: Form) -> Any:
    """The registered kernel whose constraints the form meets."""
    fitting = [
        kernel
        for kernel in quantmill_kernels()
        if (kernel.operation, kernel.form) == (operation, form.kind)
        and all(form.traits().get(name) in ok for name, ok in kernel.constraints.items())
    ]
    assert len(fitting) == 1, form.traits()
    return fitting[0]


def check(form: Form, device: str, batches: tuple[int, ...] = BATCHES) -> None:
    """Products with all batches and the dequantized weight, and the form back.

    On the GPU that is in bfloat16, with the last batch also in float16. The interpreter truncates
    to bfloat16 where the GPU rounds. float32 has no product of its own, so one batch will do.
    """
    form = form.to(device)
    kernel = kernel_for("matmul", form)
    live = Prepared.of(kernel, form)
    assert "codes" in live.tensors, "kept plain"
    matmul = resolve(kernel.implementation)
    dequantize = resolve(kernel_for("dequantize", form).implementation)
    exact = form.dequantize(torch.float32).double()
    main = torch.float16 if device == "cpu" else torch.bfloat16
    for dtype in (main, torch.float32):
        assert torch.equal(dequantize(live, dtype), form.dequantize(dtype))
    cases = [(main, rows) for rows in batches]
    cases += [(dtype, batches[-1]) for dtype in (torch.float16, torch.float32) if dtype != main]
    for dtype, rows in cases:
        bias = torch.randn(form.shape[0], device=device).to(dtype)
        x = torch.randn((rows, form.shape[1]), device=device).to(dtype)
        result = matmul(x, live, bias)
        assert result.shape == (rows, form.shape[0])
        assert result.dtype == dtype
        expected = x.double() @ exact.t() + bias.double()
        error = (result.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert rows == 0 or float(error) < BOUNDS[dtype], (dtype, rows)
    restored = live.restore().tensors()
    for name, tensor in form.tensors().items():
        assert torch.equal(
            restored[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def affine(bits: int, grouping: Grouping, shape: tuple[int, int], **options: Any) -> Affine:
    return Affine.quantize(random(*shape), bits, grouping, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("options", [{}, {"offset": "minimum"}, {"symmetric": True}], ids=str)
def test_affine_groups(bits: int, options: dict[str, Any], device: str) -> None:
    check(affine(bits, Group(64), (70, 300), scale_dtype=torch.bfloat16, **options), device)


@pytest.mark.parametrize("size", [16, 32, 128, 256, 1024])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_affine_group_sizes(size: int, scale_dtype: torch.dtype, device: str) -> None:
    check(affine(4, Group(size), (130, 1300), scale_dtype=scale_dtype), device, (1, 17))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("grouping", [Channel(0), PerTensor()], ids=str)
def test_affine_rows_and_tensors(bits: int, grouping: Grouping, device: str) -> None:
    check(affine(bits, grouping, (70, 300)), device)
    check(affine(bits, grouping, (70, 300), offset="minimum"), device)


def test_affine_without_an_offset(device: str) -> None:
    form = replace(affine(4, Group(128), (70, 512)), offset=None, offset_kind="none")
    check(form, device)


def test_affine_float_zeros(device: str) -> None:
    form = affine(4, Group(64), (70, 512))
    assert isinstance(form.offset, torch.Tensor)
    check(replace(form, offset=form.offset + 0.25), device)


def test_signed_bytes_with_a_factor(device: str) -> None:
    check(Affine.quantize_rows_int8(random(70, 300)), device)


@pytest.mark.parametrize("rows", [1, 17])
def test_columns_sorted_by_group(rows: int, device: str) -> None:
    form = affine(4, Group(64), (70, 500), scale_dtype=torch.float16)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    check(replace(form, group_index=(torch.arange(500) // 64)[order]), device, (rows,))


@pytest.mark.parametrize("shape", [(70, 192), (64, 1088)])
def test_tables_of_sixteen(shape: tuple[int, int], device: str) -> None:
    check(Codebook.quantize(random(*shape), TABLE, 64, bits=4, packing="hi4"), device)


def test_tables_beyond_the_range_of_float16(device: str) -> None:
    form = Codebook.quantize(random(70, 192), TABLE, 64, bits=4, packing="hi4")
    assert isinstance(form.scale, torch.Tensor)
    check(replace(form, table=TABLE * 2.0**20, scale=form.scale * 2.0**-20), device)


def test_nested_scales(device: str) -> None:
    form = Codebook.quantize(random(64, 512), TABLE, 64, bits=4, packing="hi4")
    assert isinstance(form.scale, torch.Tensor)
    nested = Codebook.quantize_dynamic(form.scale - form.scale.mean(), DYNAMIC, 256)
    check(replace(form, scale=replace(nested, offset=form.scale.mean())), device)


def test_tables_of_256(device: str) -> None:
    check(Codebook.quantize(random(70, 512), DYNAMIC, 128, bits=8, packing="u8"), device)


@pytest.mark.parametrize("values", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    "grouping", [PerTensor(), Channel(0), Group(32), Blocks(32, 64), Blocks(128, 128)], ids=str
)
def test_floats_of_eight_bits(values: torch.dtype, grouping: Grouping, device: str) -> None:
    check(ScaledFloat.quantize(random(70, 320), values, grouping), device)


def test_power_of_two_scales(device: str) -> None:
    form = ScaledFloat.quantize(random(70, 320), torch.float8_e4m3fn, Group(32))
    assert isinstance(form.scale, torch.Tensor)
    check(replace(form, scale=form.scale.to(torch.float8_e8m0fnu)), device)


@settings(
    max_examples=12 if torch.cuda.is_available() else 8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    out=st.integers(1, 130),
    columns=st.integers(1, 300),
    rows=st.integers(0, 40),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([16, 32, 64, 128]),
)
def test_random_shapes(
    out: int, columns: int, rows: int, bits: int, size: int, device: str
) -> None:
    check(affine(bits, Group(size), (out, columns)), device, (rows,))


def test_more_leading_dimensions_and_strides(device: str) -> None:
    form = affine(4, Group(64), (70, 256)).to(device)
    live = Prepared.of(kernel_for("matmul", form), form)
    matmul = resolve(live.kernel.implementation)
    x = torch.randn((2, 3, 512), device=device, dtype=torch.float16)[..., ::2]
    torch.testing.assert_close(matmul(x, live, None), form.matmul(x), rtol=1e-2, atol=0.1)


def test_large_batches_go_through_pieces_of_the_dequantized_weight(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmill_triton import launch

    monkeypatch.setattr(launch, "FUSED_ROWS", 16)
    monkeypatch.setattr(launch, "BUFFER_BYTES", 64 * 500 * 2)
    form = affine(4, Group(64), (200, 500))
    check(form, device, (17,))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    check(replace(form, group_index=(torch.arange(500) // 64)[order]), device, (17,))


def test_parts_of_a_row_add_up_in_the_same_order(device: str) -> None:
    form = affine(4, Group(128), (64, 8192)).to(device)
    live = Prepared.of(kernel_for("matmul", form), form)
    matmul = resolve(live.kernel.implementation)
    x = torch.randn((2, 8192), device=device, dtype=torch.float16)
    results = [matmul(x, live, None) for _ in range(3 if device == "cpu" else 50)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "config",
    [(8, 32, 4, 3, 2, 4), (8, 32, 8, 3, 1, 8), (16, 256, 8, 3, 1, 1), (128, 128, 8, 2, 1, 1, True)],
    ids=["4 teams", "8 teams", "tall", "prescaled"],
)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_way_to_launch_gives_the_same(
    config: tuple[Any, ...], bits: int, parts: int, device: str
) -> None:
    from quantmill_triton.calls import arguments
    from quantmill_triton.configs import Config
    from quantmill_triton.facts import Facts
    from quantmill_triton.launch import Weight, matmul_fused

    form = affine(bits, Group(64), (200, 2200), scale_dtype=torch.bfloat16).to(device)
    live = Prepared.of(kernel_for("matmul", form), form)
    tensors, numbers, factor = arguments(live.tensors, live.skeleton)
    facts = Facts(*numbers)
    part = -(-facts.chunks // parts)
    x = torch.randn((5, 2200), device=device, dtype=torch.float16)
    result = matmul_fused(
        x,
        Weight(*tensors),  # type: ignore[arg-type]
        None,
        facts,
        factor,
        Config(*config),
        (-(-facts.chunks // part), part),
    )
    expected = x.double() @ form.dequantize(torch.float32).double().t()
    assert float((result.double() - expected).norm() / expected.norm()) < 6e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_and_graphs_have_locks_of_their_own() -> None:
    form = affine(4, Group(128), (64, 8192)).to("cuda")
    live = Prepared.of(kernel_for("matmul", form), form)
    matmul = resolve(live.kernel.implementation)
    x = torch.randn((2, 8192), device="cuda", dtype=torch.float16)
    expected = matmul(x, live, None)
    streams = [torch.cuda.Stream() for _ in range(3)]
    graphs, outs = [], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs.append([matmul(x, live, None) for _ in range(20)])
        graphs.append(graph)
    for stream, graph in zip(streams, graphs, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
            outs.append([matmul(x, live, None) for _ in range(20)])
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for group in outs for out in group)


def test_the_compiler_sees_one_operator(device: str) -> None:
    form = affine(4, Group(64), (70, 256)).to(device)
    live = Prepared.of(kernel_for("matmul", form), form)
    matmul = resolve(live.kernel.implementation)
    dequantize = resolve(kernel_for("dequantize", form).implementation)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return matmul(x * 2, live, None) + dequantize(live, x.dtype).sum(1)

    x = torch.randn((3, 256), device=device, dtype=torch.float16)
    expected = matmul(x * 2, live, None) + form.dequantize(x.dtype).sum(1)
    torch.testing.assert_close(compiled(x), expected)


def test_a_mode_sees_the_operator(device: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from quantmill_triton.matmul import bind

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    form = affine(4, Group(64), (70, 256)).to(device)
    matmul = bind(Prepared.of(kernel_for("matmul", form), form))
    x = torch.randn((2, 3, 256), device=device, dtype=torch.float16)
    plain = matmul(x, None)
    with Watch():
        watched = matmul(x, None)
    assert seen == [torch.ops.quantmill_triton.matmul.default]
    assert torch.equal(plain, watched)
    assert torch.equal(matmul(x.requires_grad_(), None), plain)


def test_the_operators_are_sound(device: str) -> None:
    from quantmill_triton.calls import arguments

    form = affine(4, Group(64), (70, 256)).to(device)
    live = Prepared.of(kernel_for("matmul", form), form)
    tensors, facts, factor = arguments(live.tensors, live.skeleton)
    import quantmill_triton.ops  # noqa: F401

    ops = torch.ops.quantmill_triton
    x = torch.randn((3, 256), device=device, dtype=torch.float16)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.matmul.default, (x, *tensors, None, facts, factor), test_utils=utils)
    torch.library.opcheck(
        ops.dequantize.default, (*tensors, facts, factor, torch.float16), test_utils=utils
    )


def registry(device: str) -> KernelRegistry:
    # Interpreted kernels run on the CPU: register them for it.
    return KernelRegistry(
        [replace(kernel, device=device, requirements=()) for kernel in quantmill_kernels()],
        environment=False,
    )


def test_the_cores_linear_holds_the_layout_and_gives_the_form_back(device: str) -> None:
    form = affine(4, Group(64), (128, 256)).to(device)
    linear = FormLinear(form, torch.ones(128, device=device), None, registry(device), "float16")  # type: ignore[arg-type]
    assert linear.live_bytes < form.nbytes * 1.3
    x = torch.randn((3, 256), device=device, dtype=torch.float16)
    bias = torch.ones(128, device=device, dtype=torch.float16)
    torch.testing.assert_close(linear(x), form.matmul(x, bias), rtol=1e-2, atol=0.1)
    assert torch.equal(linear.form.dequantize(), form.dequantize())


def test_a_form_that_is_kept_plain_is_computed_by_its_reference(device: str) -> None:
    form = Codebook.quantize(random(5, 72), TABLE, 64, bits=4, packing="hi4").to(device)
    live = Prepared.of(kernel_for("matmul", form), form)
    x = torch.randn((3, 72), device=device)
    assert torch.equal(resolve(live.kernel.implementation)(x, live, None), form.matmul(x))
    dequantize = resolve(kernel_for("dequantize", form).implementation)
    assert torch.equal(dequantize(live, torch.float32), form.dequantize(torch.float32))


def test_interpreting_is_off_on_a_gpu() -> None:
    if torch.cuda.is_available():
        assert os.environ.get("TRITON_INTERPRET", "0") != "1"
