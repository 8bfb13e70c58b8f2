"""auto-round's checkpoints in AWQ's packing are AWQ's with another config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill

DATA = Path(__file__).parent / "data"


def test_the_same_weights_come_out(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = tmp_path / "auto"
    shutil.copytree(DATA / "awq-4-g64-gemm", folder)
    (folder / "quantize_config.json").unlink(missing_ok=True)
    whole = json.loads((folder / "config.json").read_text())
    whole["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_awq",
        "bits": 4,
        "group_size": 64,
        "sym": False,
        "data_type": "int",
        "act_bits": 16,
        "extra_config": {"lm_head": {"bits": 16}},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    ours: Any = quantmill.load(folder, dequantize=True)
    wanted = quantmill.load(DATA / "awq-4-g64-gemm", dequantize=True).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.state_dict().items())
