"""Checkpoints that the peer wrote give the logits that the peer gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantmill

DATA = Path(__file__).parents[1] / "data"
# int8 is exact; the 4-bit linears run in the library's fused kernel or not, as the machine has it,
# and the two round scales and sums to bf16 differently.
TOLERANCE = {
    "bnb-nf4": 0.03,
    "bnb-nf4-dq": 0.03,
    "bnb-fp4": 0.03,
    "bnb-nf4-ragged": 0.03,
    "bnb-int8": 1e-6,
    "tiny-llama": 5e-3,
    "tiny-ragged": 5e-3,
}


@pytest.mark.parametrize("name", sorted(TOLERANCE))
def test_logits_match(name: str) -> None:
    model: Any = quantmill.load(DATA / name)
    expected = load_file(DATA / name / "expected.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    error = (logits - expected["logits"]).norm() / expected["logits"].norm()
    assert error <= TOLERANCE[name]


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"])
def test_the_state_dict_is_the_file_before_and_after_a_forward(name: str) -> None:
    model: Any = quantmill.load(DATA / name)
    stored = load_file(DATA / name / "model.safetensors")
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    for when in ("before", "after"):
        state = model.state_dict()
        assert set(state) == set(stored), when
        for key, tensor in stored.items():
            assert torch.equal(state[key], tensor), (when, key)
        with torch.inference_mode():
            model(input_ids=ids)


@pytest.mark.parametrize(
    ("preset", "name", "source"),
    [
        ("bnb-nf4", "bnb-nf4", "tiny-llama"),
        ("bnb-nf4-dq", "bnb-nf4-dq", "tiny-llama"),
        ("bnb-fp4", "bnb-fp4", "tiny-llama"),
        ("bnb-int8", "bnb-int8", "tiny-llama"),
        ("bnb-nf4", "bnb-nf4-ragged", "tiny-ragged"),
    ],
)
def test_what_we_write_is_what_the_peer_wrote(
    preset: str, name: str, source: str, tmp_path: Path
) -> None:
    quantmill.quantize(DATA / source, tmp_path / "out", preset)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(DATA / name / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
