"""8-bit products: numbers where a CPU can show them, and what is said where there are none."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantmill.findings import Severity
from quantmill.forms import Blocks, Channel, Group, PerTensor, ScaledFloat
from quantmill_fp8 import fbgemm
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config
from quantmill_fp8.native import Product, kind_of, plain_activations, unavailable, unfit
from quantmill_fp8.validate import _activations, _library

E4M3 = torch.float8_e4m3fn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("bound", [None, 1.0])
def test_rows_are_rounded_per_token(bound: float | None) -> None:
    form = ScaledFloat.quantize(random(48, 64), E4M3, Channel(0))
    x = random(2, 5, 64, seed=1).to(torch.bfloat16)
    x[0, 0] *= 1000  # one token's scale is its own affair
    rows = x.reshape(-1, 64).float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(max=bound or float("inf")) / 448
    codes = (rows / scale).clamp(-448, 448).to(E4M3).float()
    wanted = (codes * scale) @ form.dequantize(torch.float32).t()
    found = Product(form, bound)(x)
    assert found.shape == (2, 5, 48) and found.dtype == torch.bfloat16
    assert off(found.reshape(-1, 48), wanted) < 0.005
    if bound is None:
        assert off(found, x.float() @ form.dequantize(torch.float32).t()) < 0.05


def test_static_scales_are_used_as_they_are() -> None:
    form = ScaledFloat.quantize(random(32, 64), E4M3, PerTensor())
    x = random(7, 64, seed=1).to(torch.bfloat16)
    scale = torch.tensor(0.01)
    codes = (x.float() / scale).clamp(-448, 448).to(E4M3).float()
    wanted = (codes * scale) @ form.dequantize(torch.float32).t()
    assert off(Product(form)(x, scale), wanted) < 0.005


def test_codes_of_blocks_are_scaled_by_128_columns_of_a_token() -> None:
    x = random(5, 256)
    x[:, 128:] *= 100
    codes, scale = plain_activations(x, size=128)
    assert scale.shape == (5, 2) and scale.stride() == (1, 5)
    wide = scale.repeat_interleave(128, dim=1)
    assert off(codes.float() * wide, x) < 0.04
    assert codes.float().abs().max() == 448


@pytest.mark.parametrize(
    ("shape", "grouping", "word"),
    [
        ((48, 64), Channel(0), None),
        ((50, 64), Channel(0), "multiple of 16"),
        ((256, 128), Blocks(128, 128), None),
        ((192, 128), Blocks(128, 128), "multiple of 128"),
        ((64, 64), Blocks(64, 64), "scales are by"),
        ((64, 64), Group(32), "scales are by"),
    ],
)
def test_what_fits_a_product(shape: tuple[int, int], grouping: Any, word: str | None) -> None:
    found = unfit(ScaledFloat.quantize(random(*shape), E4M3, grouping))
    assert found is None if word is None else found is not None and word in found
    assert kind_of(Channel(1)) is None


def test_a_fallback_is_told() -> None:
    assert unavailable("row", "cpu") is not None
    options = SimpleNamespace(output=None, dequantize=False)
    job: Any = SimpleNamespace(device="cuda", options=options, plan=None)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which may have no fallback")
    (found,) = _activations(job, Fp8Config(), "fp8")
    assert found.code == "QM-FP8-015" and found.severity is Severity.WARNING
    assert "no products" in found.cause
    (found,) = _activations(job, Fp8Config(weight_block_size=(64, 64)), "fp8")
    assert "no product for scales by" in found.cause
    job.device = "cpu"
    (found,) = _activations(job, FbgemmFp8Config(), "fp8")
    assert found.code == "QM-FP8-011" and found.severity is Severity.INFO


@pytest.mark.parametrize(
    ("torch_version", "version"),
    [("2.13.0+cpu", "1.8.0"), ("2.6.0", "1.1.0"), ("2.9.1", "1.4.0"), ("1.13", None), ("x", None)],
)
def test_versions_of_fbgemm_follow_pytorch(torch_version: str, version: str | None) -> None:
    assert fbgemm.wanted(torch_version) == version


def test_a_wrong_fbgemm_is_a_finding_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    have = {"fbgemm-gpu": "1.2.0+cu126"}

    def version(name: str) -> str:
        if name.startswith("fbgemm"):
            if name in have:
                return have[name]
            raise metadata.PackageNotFoundError(name)
        return "2.13.0+cpu" if name == "torch" else real(name)

    monkeypatch.setattr(fbgemm.metadata, "version", version)
    (found,) = _library()
    assert found.code == "QM-FP8-016"
    assert "fbgemm-gpu 1.2.0+cu126" in found.cause and "2.13.0" in found.cause
    assert found.fix == 'pip install "fbgemm-gpu==1.8.0"'
    have["fbgemm-gpu"] = "1.8.0"
    assert not list(_library()) and fbgemm.problem() is None
    have.clear()
    assert not list(_library())
    assert fbgemm.problem() == ("it is not installed", 'pip install "fbgemm-gpu==1.8.0"')
