"""Calibrated quantization on a GPU: batches pause within blocks there, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.testing import write_tiny_llama

pytest.importorskip("quantmill_gptq")
pytest.importorskip("quantmill_transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

METHODS = [
    "gptq-4:group_size=32",
    "gptq-3:group_size=32,desc_act=true,sym=false",
    "gptq-3:group_size=32,gptaq_alpha=0.5",
]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_as_good_as_on_the_processor(method: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "float", hidden=96, inner=160, layers=3, heads=4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 24, (16, 48), generator=generator).repeat_interleave(2, dim=1)
    exact: Any = quantmill.load(folder)
    with torch.inference_mode():
        wanted = exact(ids).logits.float().log_softmax(-1)
        errors = {}
        for device in ("cpu", "cuda"):
            out = tmp_path / device
            quantmill.quantize(folder, out, method, calibration=ids, device=device)
            model: Any = quantmill.load(out)
            found = model(ids).logits.float().log_softmax(-1)
            errors[device] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    # Products differ in their last bits, and so do some of the codes.
    assert errors["cuda"] < 1.1 * errors["cpu"]
