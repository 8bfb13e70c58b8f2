"""auto-round's checkpoints in GPTQ's packing are GPTQ's with another config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.findings import QuantmillError
from quantmill_gptq.autoround import translate

DATA = Path(__file__).parent / "data"


def renamed(name: str, folder: Path, **config: Any) -> Path:
    """A checkpoint of ours with auto-round's config in place of GPTQ's."""
    shutil.copytree(DATA / name, folder)
    (folder / "quantize_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    old = whole["quantization_config"]
    whole["quantization_config"] = {
        "quant_method": "auto-round",
        "bits": old["bits"],
        "group_size": old["group_size"],
        "sym": old["sym"],
        "data_type": "int",
        "iters": 200,
        "autoround_version": "0.8.0",
        **config,
    }
    path.write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("gptq-8-g64", "auto_round:auto_gptq"),
        ("gptq-3-g32", "auto_round:gptq"),
        ("gptq-4-g128-v2", "auto_round:gptqmodel"),
        ("gptq-4-g128-v2", "auto_round"),
    ],
)
def test_the_same_weights_come_out(name: str, packing: str, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = renamed(name, tmp_path / "auto", packing_format=packing)
    ours: Any = quantmill.load(folder, dequantize=True)
    theirs: Any = quantmill.load(DATA / name, dequantize=True)
    wanted = theirs.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.state_dict().items())


def test_options_of_single_modules_become_dynamic() -> None:
    found = translate(
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {
                "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 128, "sym": True},
                "model.layers.1.mlp.up_proj": {"bits": 16},
                ".*down_proj": {"bits": 4, "group_size": 32},
                "model.layers.2.mlp.up_proj": {"bits": 4},
            },
        }
    )
    assert found["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 8},
        r"-:^model\.layers\.1\.mlp\.up_proj$": {},
        r"+:^.*down_proj$": {"group_size": 32},
    }


@pytest.mark.parametrize(
    "config",
    [
        {"packing_format": "auto_round:llm_compressor"},
        {"packing_format": "auto_round:auto_gptq", "data_type": "mx_fp"},
        {"packing_format": "auto_round:auto_gptq", "act_bits": 8},
    ],
)
def test_other_packings_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = renamed("gptq-8-g64", tmp_path / "auto", **config)
    with pytest.raises(QuantmillError) as caught:
        quantmill.plan(folder)
    (found,) = caught.value.findings
    assert found.code == "QM-CONFIG-010" and "auto-round" in found.cause
