"""Whole models under ``torch.compile``, in one graph, with kernels and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.host import default_host

pytestmark = pytest.mark.interop
zoo = pytest.importorskip("quantmill_transformers.testing")
TINY = Path(__file__).parents[1] / "data" / "tiny-llama"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_in_one_graph(model: Any, ids: torch.Tensor) -> bool:
    # No code is generated: a graph break would already be an error before that.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        found = compiled(input_ids=ids, use_cache=False).logits.float()
    return float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("method", ["ct-int4", "torchao-int8wo", "fp8-block", "quanto-int8"])
def test_a_model_is_one_graph_by_the_forms_reference_too(method: str) -> None:
    if method not in default_host().presets:
        pytest.skip(f"no installed plugin has {method}")
    model = quantmill.load(TINY, method, dtype="float32")
    assert same_in_one_graph(model, torch.tensor([[5, 6, 7, 8]]))


def test_a_mixture_is_one_graph(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_cpu")
    if "hqq-4" not in default_host().presets:
        pytest.skip("no installed plugin has hqq-4")
    model: Any = quantmill.load(zoo.write("qwen3-moe", tmp_path), "hqq-4", dtype="bfloat16")
    assert same_in_one_graph(model, zoo.sample("qwen3-moe", model)["input_ids"])
