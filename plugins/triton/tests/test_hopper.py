"""The kernel for Hopper: where it is chosen, and on such a GPU what it gives."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantmill.forms import Affine, Group
from quantmill.kernels import Prepared
from quantmill.registrations import resolve
from quantmill_triton import available
from quantmill_triton.configs import FUSED_ROWS, Config, choose, split_of
from quantmill_triton.facts import Facts

H200 = (227 << 10, 132)
"""Bytes of shared memory for a program, and processors."""

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or find_spec("triton") is None
    or not available.gluon_known(),
    reason="needs a Hopper GPU and a Triton whose Gluon is known",
)


def facts(rows: int, columns: int, **other: int) -> Facts:
    """Of 4 bits in groups of 128, bfloat16 scales and a zero beside each."""
    made = Facts(
        rows=rows,
        columns=columns,
        bits=4,
        high_bits=0,
        width=64,
        slices=4,
        group=128,
        tall=1,
        groups=columns // 128,
        lanes=-(-rows // 64) * 64,
        values=0,
        scales=1,
        offset=1,
        middle=0,
        paired=0,
        ordered=0,
    )
    return made._replace(**other)


@pytest.mark.parametrize(
    ("shape", "bn", "parts"),
    [((8192, 8192), 64, 2), ((28672, 8192), 128, 1), ((8192, 28672), 64, 2), ((4096, 4096), 64, 4)],
    ids=str,
)
def test_tiles_are_those_that_were_measured(shape: tuple[int, int], bn: int, parts: int) -> None:
    shared, processors = H200
    for rows, bm in ((1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32)):
        config = choose(facts(*shape), rows, shared, processors)
        assert config.streamed
        assert (config.bm, config.bn) == (bm, bn)
        assert split_of(facts(*shape), rows, config, processors)[0] == parts


@pytest.mark.parametrize(
    ("shape", "bn", "parts"),
    [((8192, 8192), 64, 1), ((28672, 8192), 128, 1), ((8192, 28672), 64, 1), ((4096, 4096), 64, 2)],
    ids=str,
)
def test_more_rows_have_tiles_of_64(shape: tuple[int, int], bn: int, parts: int) -> None:
    shared, processors = H200
    config = choose(facts(*shape), 64, shared, processors)
    assert (config.streamed, config.bm, config.bn) == (True, 64, bn)
    assert split_of(facts(*shape), 64, config, processors)[0] == parts
    assert choose(facts(*shape), FUSED_ROWS, shared, processors).streamed


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 8, "slices": 2},
        {"group": 64, "groups": 128},
        {"scales": 0},
        {"offset": 3},
        {"columns": 8192 + 128, "groups": 65},
        {"rows": 256},
        {"values": 1, "paired": 1, "offset": 0},
    ],
    ids=str,
)
def test_other_weights_keep_the_other_kernel(other: dict[str, int]) -> None:
    shared, processors = H200
    assert not choose(facts(8192, 8192)._replace(**other), 16, shared, processors).streamed


def test_other_devices_keep_the_other_kernel() -> None:
    assert not choose(facts(8192, 8192), 16, H200[0]).streamed


@pytest.mark.parametrize(
    ("version", "known"),
    [("3.5.1", False), ("3.6.0", True), ("3.8.0+cu130", True), ("3.9.0", False), ("4.6", False)],
)
def test_gluon_is_known_by_its_version(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "version", lambda name: version)
    assert available.gluon_known() is known


def streamed(bn: int, **other: Any) -> Config:
    return Config(16, bn, 4, 4, 2, early=8192, streamed=True)._replace(**other)


@pytest.mark.parametrize("bn", [64, 128])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
    ids=["bfloat16", "float16"],
)
def test_the_kernel_sums_what_it_should_emulated(
    bn: int, parts: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    from emulated_gluon import emulated

    from quantmill_triton.layout import facts_of, prepare

    generator = torch.Generator().manual_seed(parts)
    # 200 rows: the last tile is not full, and of its two blocks one is padding, or lacks.
    weight = torch.randn((200, 2560), generator=generator)
    form = Affine.quantize(weight, 4, Group(128), scale_dtype=scale_dtype)
    tensors = prepare(form)
    known = facts_of(form, tensors)
    assert known is not None
    part = -(-known.chunks // parts)
    split = (-(-known.chunks // part), part)
    live = SimpleNamespace(codes=tensors["codes"], scale=tensors["pairs"], descriptors={})
    with emulated(sys.modules):
        from quantmill_triton.hopper import matmul_streamed, streamed_launch

        for rows, bias, factor in ((9, False, 1.0), (16, True, 0.5), (40, True, 1.0)):
            x = torch.randn((rows, 2560), generator=generator).to(dtype)
            added = torch.randn(200, generator=generator).to(dtype) if bias else None
            out = torch.full((rows, 200), float("nan"), dtype=dtype)
            work = torch.full((split[0], rows, 200), float("nan"))
            locks = torch.zeros(12, dtype=torch.int32)
            config = streamed(bn, stages=3)
            launch = streamed_launch(known, factor, config, -(-rows // 16), split[0], bias)
            results = (out, work, locks)
            matmul_streamed(launch, x, live, added, known, config, part, results)  # type: ignore[arg-type]
            expected = x.double() @ form.dequantize(torch.float32).double().t() * factor
            if added is not None:
                expected += added.double()
            error = (out.double() - expected).norm() / expected.norm()
            assert float(error) < (6e-4 if dtype == torch.float16 else 4e-3)
            assert not locks.any()


def check(
    form: Affine,
    x: torch.Tensor,
    config: Config,
    parts: int,
    bias: torch.Tensor | None = None,
    factor: float = 1.0,
) -> None:
    from test_kernels import kernel_for

    from quantmill_triton.calls import arguments
    from quantmill_triton.launch import Weight, matmul_fused

    live = Prepared.of(kernel_for("matmul", form), form)
    tensors, numbers, _ = arguments(live.tensors, live.skeleton)
    known = Facts(*numbers)
    part = -(-known.chunks // parts)
    split = (-(-known.chunks // part), part)
    weight = Weight(*tensors)  # type: ignore[arg-type]
    results = [matmul_fused(x, weight, bias, known, factor, config, split) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)
    expected = x.double() @ form.dequantize(torch.float32).double().t() * factor
    if bias is not None:
        expected += bias.double()
    error = (results[0].double() - expected).norm() / expected.norm()
    assert float(error) < (6e-4 if x.dtype == torch.float16 else 4e-3)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("bn", [64, 128])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_sums_are_the_forms(
    bn: int, parts: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    # 300 rows: the last tile is not full, and of two blocks one may lack altogether.
    generator = torch.Generator().manual_seed(parts)
    weight = torch.randn((300, 2048), generator=generator)
    form = Affine.quantize(weight, 4, Group(128), scale_dtype=scale_dtype).to("cuda")
    bias = torch.randn(300, generator=generator).to("cuda", dtype)
    for rows in (1, 9, 16, 40):
        x = torch.randn((rows, 2048), generator=generator).to("cuda", dtype)
        check(form, x, streamed(bn), parts)
        check(form, x, streamed(bn, early=-1), parts, bias, 0.5)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "tiles",
    [
        (8, 128, 4, 4, 2),
        (32, 128, 4, 3, 2),
        (32, 64, 4, 4, 2),
        (64, 128, 8, 4, 1),
        (64, 64, 4, 5, 1),
    ],
    ids=str,
)
def test_tiles_of_any_rows_give_the_same(tiles: tuple[int, ...]) -> None:
    form = Affine.quantize(torch.randn((300, 2048)), 4, Group(128), scale_dtype=torch.bfloat16)
    config = Config(*tiles, early=8192, streamed=True)
    for rows in (1, tiles[0], 2 * tiles[0] + 1, 200):
        x = torch.randn((rows, 2048), device="cuda", dtype=torch.bfloat16)
        for parts in (1, 2):
            check(form.to("cuda"), x, config, parts)


@pytest.mark.gpu
@on_hopper
def test_activations_lie_anywhere() -> None:
    form = Affine.quantize(torch.randn((128, 1024)), 4, Group(128), scale_dtype=torch.bfloat16)
    form = form.to("cuda")
    wide = torch.randn((16, 2051), device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 3:1027], wide[:, :1024], wide[:, :2048:2]):
        check(form, x, streamed(64), 2)


@pytest.mark.gpu
@on_hopper
def test_the_registered_kernel_takes_it() -> None:
    from test_kernels import kernel_for

    form = Affine.quantize(
        torch.randn((8192, 8192), device="cuda"), 4, Group(128), scale_dtype=torch.bfloat16
    )
    order = torch.randperm(8192, generator=torch.Generator().manual_seed(1))
    sorted_groups = (torch.arange(8192) // 128)[order].to("cuda")
    for one in (form, replace(form, group_index=sorted_groups)):
        kernel = kernel_for("matmul", one)
        live = Prepared.of(kernel, one)
        x = torch.randn((16, 8192), device="cuda", dtype=torch.bfloat16)
        result = resolve(kernel.implementation)(x, live, None)
        expected = x.double() @ one.dequantize(torch.float32).double().t()
        assert float((result.double() - expected).norm() / expected.norm()) < 4e-3
