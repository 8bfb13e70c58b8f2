"""What the quantizer makes: bytes against a plain loop, ragged edges, extremes, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.backend import NonFiniteWeight
from quantmill.findings import QuantmillError
from quantmill.forms import ScaledFloat
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target, write_tiny_llama
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config
from quantmill_fp8.quantizer import BlockQuantizer, RowQuantizer

SHAPES = [(192, 160), (576, 96), (128, 128), (5, 300), (1, 1), (130, 257)]


def quantize(weight: Tensor, rows: int = 3, **fields: Any) -> ScaledFloat:
    config = Fp8Config(**fields)
    quantizer = BlockQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))
    form = quantizer.quantize(make_target(*weight.shape), MatrixSource(weight, rows=rows))
    assert isinstance(form, ScaledFloat)
    return form


def quantize_rows(weight: Tensor) -> ScaledFloat:
    quantizer = RowQuantizer(
        FbgemmFp8Config(), device=torch.device("cpu"), kernels=KernelRegistry([])
    )
    form = quantizer.quantize(make_target(*weight.shape), MatrixSource(weight))
    assert isinstance(form, ScaledFloat)
    return form


def make_weight(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    # Every block has another magnitude, so that a wrong scale shows.
    spread = 2.0 ** (torch.arange(shape[0])[:, None] % 11 + torch.arange(shape[1]) // 40)
    return (made * spread).to(dtype)


def by_loop(weight: Tensor, bm: int, bn: int, power: bool = False) -> tuple[Tensor, Tensor]:
    """The definition, block by block."""
    rows, columns = weight.shape
    scale = torch.ones(math.ceil(rows / bm), math.ceil(columns / bn))
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = (slice(i * bm, (i + 1) * bm), slice(j * bn, (j + 1) * bn))
            block = weight[where].float()
            if block.any():
                scale[i, j] = block.abs().max() / 448
            if power:
                scale[i, j] = 2.0 ** math.ceil(math.log2(scale[i, j].item()))
            values[where] = (block / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scale


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(128, 128), (64, 48), (1, 32), (3, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_is_that_of_the_loop(
    shape: tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = (make_weight(shape, torch.float32) / 256).to(dtype)
    for scale_fmt in ("float", "ue8m0"):
        form = quantize(weight, weight_block_size=size, scale_fmt=scale_fmt)
        values, scale = by_loop(weight, *size, power=scale_fmt == "ue8m0")
        assert isinstance(form.scale, Tensor)
        assert torch.equal(form.scale.float(), scale) and same_bytes(form.values, values)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_tensors_are_those_of_the_loop(shape: tuple[int, int]) -> None:
    weight = make_weight(shape)
    rows, whole = quantize_rows(weight), quantize(weight, weight_block_size=None)
    for form, size in ((rows, (1, shape[1])), (whole, shape)):
        values, scale = by_loop(weight, *size)
        assert isinstance(form.scale, Tensor)
        assert torch.equal(form.scale.reshape(-1), scale.reshape(-1))
        assert same_bytes(form.values, values)


def test_an_exact_power_of_two_stays_one() -> None:
    for power in range(-120, 119):
        weight = torch.full((2, 2), 448.0 * 2.0**power, dtype=torch.float32)
        form = quantize(weight, scale_fmt="ue8m0")
        assert torch.equal(form.dequantize(), weight), power
        assert isinstance(form.scale, Tensor)
        assert form.scale.dtype == torch.float8_e8m0fnu and form.scale.float() == 2.0**power


@pytest.mark.parametrize("fields", [{}, {"scale_fmt": "ue8m0"}, {"weight_block_size": None}])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-36, 3e38])
def test_extreme_magnitudes_are_finite(fields: dict[str, Any], size: float) -> None:
    weight = torch.full((4, 5), size)
    weight[0, 0] = -size
    for form in (quantize(weight, **fields), quantize_rows(weight)):
        found = form.dequantize(torch.float32)
        assert torch.isfinite(found).all()
        if size > 1e-36 and form.dtype == torch.float32:
            assert torch.allclose(found, weight, rtol=0.07)
    zeros = quantize(torch.zeros(4, 5), **fields)
    assert isinstance(zeros.scale, Tensor)
    assert (zeros.scale.float() == 1).all() and not zeros.dequantize().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [(128, 128), (2, 3), None])
def test_the_first_value_that_is_not_finite_is_named(value: float, size: Any) -> None:
    weight = make_weight((9, 65))
    weight[7, 3] = weight[8, 0] = value
    with pytest.raises(NonFiniteWeight) as caught:
        quantize(weight, weight_block_size=size)
    assert caught.value.name == "layer.weight" and caught.value.index == 7 * 65 + 3
    with pytest.raises(NonFiniteWeight) as caught:
        quantize_rows(weight)
    assert caught.value.index == 7 * 65 + 3


def test_the_source_is_not_written_to() -> None:
    weight = make_weight((40, 40), torch.float32)
    before = weight.clone()

    class Bare(MatrixSource):
        def row_blocks(self, multiple: int = 1) -> Any:
            yield 0, self._weight

    for fields in ({}, {"weight_block_size": None}):
        config = Fp8Config(**fields)  # type: ignore[arg-type]
        quantizer = BlockQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))
        quantizer.quantize(make_target(40, 40), Bare(weight))
        assert torch.equal(weight, before)


def test_static_scales_are_refused_without_calibration(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "float")
    plan = quantmill.plan(folder, "fp8-block:activation_scheme=static")
    assert [item.code for item in plan.findings.errors] == ["QM-FP8-010"]
    with pytest.raises(QuantmillError):
        quantmill.quantize(folder, tmp_path / "out", "fp8-block:activation_scheme=static")


def test_a_switch_of_the_peer_is_said_to_do_nothing(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "float")
    found = quantmill.plan(folder, "fp8-block:dequantize=true").findings
    assert "QM-FP8-012" in [item.code for item in found] and not found.errors
