"""Several methods in one model: planned, loaded, written as a table of targets, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_llama

METHOD = {
    "method": "bnb-nf4",
    "skip": ["model.layers.1.mlp.down_proj"],
    "assign": {"role:attention": "bnb-int8", "layers:0 & role:mlp": "bnb-nf4-dq"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "float", layers=2)


def _forms(plan: Any) -> dict[str, str]:
    return {item.name: item.form for item in plan.modules if item.action == "quantize"}


def test_each_module_gets_the_method_assigned_to_it(folder: Path) -> None:
    forms = _forms(quantmill.plan(folder, METHOD))
    assert "affine 8-bit" in forms["model.layers.0.self_attn.q_proj"]
    assert "affine 8-bit" in forms["model.layers.1.self_attn.o_proj"]
    assert forms["model.layers.0.mlp.up_proj"].endswith("nested")
    assert "nf4" in forms["model.layers.1.mlp.up_proj"]
    assert "nested" not in forms["model.layers.1.mlp.up_proj"]
    assert "model.layers.1.mlp.down_proj" not in forms


def test_the_table_is_written_and_read_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(1, 12)
    model: Any = quantmill.load(folder, METHOD)
    report = quantmill.quantize(folder, tmp_path / "out", METHOD)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "quantmill"
    assert stored["targets"]["model.layers.0.self_attn.q_proj"] == "bnb-int8"
    assert set(stored["methods"]) == {"bnb-nf4", "bnb-int8", "bnb-nf4-dq"}
    again: Any = quantmill.load(tmp_path / "out")
    state, other = model.state_dict(), again.state_dict()
    assert set(state) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert _forms(quantmill.plan(tmp_path / "out")) == _forms(report.plan)
    assert model.config.quantization_config.to_dict() == stored


def test_one_config_for_all_is_the_peers_own(folder: Path, tmp_path: Path) -> None:
    method = {"method": "bnb-nf4", "assign": {"layers:0": "bnb-nf4"}}
    quantmill.quantize(folder, tmp_path / "out", method)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes" and stored["load_in_4bit"]


def test_two_dicts_assigned_are_two_selections(folder: Path) -> None:
    method = {
        "method": "bnb-nf4",
        "assign": {
            "layers:0": {"load_in_4bit": True, "bnb_4bit_blocksize": 128},
            "layers:1": {"load_in_4bit": True, "bnb_4bit_blocksize": 256},
        },
    }
    forms = _forms(quantmill.plan(folder, method))
    assert "flat 128" in forms["model.layers.0.mlp.up_proj"]
    assert "flat 256" in forms["model.layers.1.mlp.up_proj"]


def test_a_method_on_top_of_several_is_refused(folder: Path, tmp_path: Path) -> None:
    quantmill.quantize(folder, tmp_path / "out", METHOD)
    with pytest.raises(QuantmillError) as caught:
        quantmill.load(tmp_path / "out", "bnb-nf4")
    assert caught.value.findings[0].code == "QM-SELECT-006"


@pytest.mark.parametrize(
    "change",
    [
        {"table_version": 99},
        {"methods": []},
        {"targets": {"model.layers.0.mlp.up_proj": "nobody"}},
    ],
)
def test_a_malformed_table_is_a_finding(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    table = {"quant_method": "quantmill", "table_version": 1, "methods": {"a": {}}, "targets": {}}
    config["quantization_config"] = {**table, **change}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantmillError) as caught:
        quantmill.plan(folder)
    assert caught.value.findings[0].code == "QM-TABLE-001"


def test_keeping_a_stored_quantized_module_is_an_error(folder: Path, tmp_path: Path) -> None:
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4")
    plan = quantmill.plan(tmp_path / "out", skip=["model.layers.0.mlp.up_proj"])
    assert [item.code for item in plan.findings.errors] == ["QM-TARGET-103"]
    model: Any = quantmill.load(tmp_path / "out", dequantize=True)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
