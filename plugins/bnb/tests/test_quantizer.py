"""What the quantizer refuses, and what it makes of unusual weights; bytes against the peer are
in tests/interop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.backend import NonFiniteWeight
from quantmill.findings import QuantmillError
from quantmill.testing import MatrixSource, make_target, write_tiny_llama

FOUR = {"load_in_4bit": True}
NESTED = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
EIGHT = {"load_in_8bit": True}
EACH = pytest.mark.parametrize("fields", [FOUR, NESTED, EIGHT], ids=["4bit", "nested", "int8"])


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_that_the_library_does_not_take_are_taken_as_float32(
    bench: Any, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    made, target = bench(**fields), make_target(6, 64)
    weight = made.weight((6, 64)).to(dtype)
    form = made.quantizer.quantize(target, Whole(weight))
    again = made.quantizer.quantize(target, Whole(weight.to(torch.float32)))
    assert form.dtype == torch.float32 == made.quantizer.abstract(target, dtype).dtype
    for name, tensor in made.codec.encode(form).items():
        assert torch.equal(tensor, made.codec.encode(again)[name]), name


class Whole(MatrixSource):
    """A weight in one block, not contiguous."""

    def row_blocks(self, multiple: int = 1) -> Any:
        yield 0, torch.stack([self._weight, self._weight], dim=-1)[..., 0]


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_value_that_is_not_finite_is_named(
    bench: Any, fields: dict[str, Any], value: float
) -> None:
    made = bench(**fields)
    weight = made.weight((9, 65))
    weight[7, 3] = weight[8, 0] = value
    with pytest.raises(NonFiniteWeight) as caught:
        made.quantizer.quantize(make_target(9, 65), MatrixSource(weight))
    assert caught.value.index == 7 * 65 + 3


def test_int8_refuses_what_overflows_in_float16(bench: Any) -> None:
    made = bench(**EIGHT)
    weight = made.weight((4, 64), torch.float32)
    weight[1, 2] = 65519.0
    form = made.quantizer.quantize(make_target(4, 64), MatrixSource(weight))
    assert form.scale[1] == 65504.0
    weight[1, 2] = 65520.0
    with pytest.raises(NonFiniteWeight) as caught:
        made.quantizer.quantize(make_target(4, 64), MatrixSource(weight))
    assert caught.value.index == 66


def test_scales_whose_mean_overflows_are_a_finding(bench: Any) -> None:
    weight = torch.full((4, 64), 3e38)
    with pytest.raises(QuantmillError) as caught:
        bench(**NESTED).quantizer.quantize(make_target(4, 64), MatrixSource(weight, "a.weight"))
    (finding,) = caught.value.findings
    assert finding.code == "QM-BNB-002" and finding.where == "a.weight"
    form = bench(**FOUR).quantizer.quantize(make_target(4, 64), MatrixSource(weight))
    assert torch.equal(form.dequantize(), weight)


@pytest.mark.parametrize("scale", [0.0, 1e-39, 1e-41, 1e-45])
def test_scales_without_a_reciprocal_are_quantized(bench: Any, scale: float) -> None:
    made = bench(**NESTED)
    weight = made.weight((8, 64), torch.float32) * scale
    form = made.quantizer.quantize(make_target(8, 64), MatrixSource(weight))
    values = form.dequantize(torch.float32)
    assert values.isfinite().all() and (values - weight).abs().max() <= 4 * scale


def test_widths_that_no_block_divides_are_said_once(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "odd", hidden=40, inner=65, heads=2)
    said = [item for item in quantmill.plan(folder, "bnb-nf4").findings if "BNB" in item.code]
    assert [item.code for item in said] == ["QM-BNB-010"]
    assert "more" in said[0].where and "64" in said[0].cause
    even = write_tiny_llama(tmp_path / "even")
    assert not any("BNB" in item.code for item in quantmill.plan(even, "bnb-nf4").findings)
