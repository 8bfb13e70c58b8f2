"""What is written loads in transformers, with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantmill
from quantmill.testing import write_tiny_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(
    "method",
    [
        # Blocks that divide the widths of 64 and 96: with others the peer reads wrongly.
        "fp8-block:weight_block_size=[32,32]",
        "fp8-block-ue8m0:weight_block_size=[16,32]",
        "fp8-mx",
        "fp8-tensor",
    ],
)
def test_transformers_reads_the_same_weights(tmp_path: Path, method: str) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = write_tiny_llama(tmp_path / "float")
    skipped = "model.layers.0.mlp.down_proj"
    quantmill.quantize(folder, tmp_path / "out", method, skip=[skipped])
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours = quantmill.load(tmp_path / "out", dequantize=True).state_dict()
    theirs = peer.state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
