"""Mixtures of experts with every method: quantized, saved, loaded, and equal to what they say."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.experts import LinearExperts

testing = pytest.importorskip("quantmill_transformers.testing")

MODELS = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gpt-oss"]
METHODS: Mapping[str, Any] = {
    "bnb-nf4": "bnb-nf4",
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "hqq": "hqq-4",
    "ct": "ct-int8",
    "gguf": "gguf-q4_0",
}
# The library's kernel for CPUs computes in bfloat16.
TOLERANCE = {"bnb-nf4": 0.02}


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Path:
        made: Path = testing.write(name, tmp_path_factory.mktemp("models") / name)
        return made

    return make


def logits(name: str, model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**testing.sample(name, model)).logits
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", MODELS)
def test_experts(name: str, method: str, float_model: Any, tmp_path: Path) -> None:
    folder, options = float_model(name), {}
    if method in ("gptq", "awq"):
        generator = torch.Generator().manual_seed(0)
        options["calibration"] = torch.randint(3, 96, (16, 32), generator=generator)
    model: Any = quantmill.load(folder, METHODS[method], **options)
    job = model.quantmill_job
    experts = [item for item in job.plan.modules if ".experts." in item.name]
    assert experts and all(item.action == "quantize" for item in experts)
    assert any(isinstance(part, LinearExperts) for part in model.modules())
    found = logits(name, model)
    if next(iter(job.selections.values())).method.capabilities.serialisable:
        quantmill.quantize(folder, tmp_path / "out", METHODS[method], **options)
        assert torch.equal(logits(name, quantmill.load(tmp_path / "out")), found)
    again = logits(name, quantmill.dequantize(model))
    assert (found - again).norm() < TOLERANCE.get(method, 1e-5) * again.norm()
