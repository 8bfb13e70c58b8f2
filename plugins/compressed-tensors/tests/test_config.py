"""The config: peers' files byte for byte, short forms, groups and what claims a module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import quantmill
from quantmill.findings import Finding, FindingsError, QuantmillError
from quantmill.testing import write_tiny_llama
from quantmill_compressed_tensors.config import CompressedConfig, rules
from quantmill_compressed_tensors.schemes import NAMED, args, scheme

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())
WEIGHTS = args(num_bits=4, strategy="group", group_size=64)


def stored(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((DATA / name / "config.json").read_text())
    return dict(raw["quantization_config"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_peers_config_is_written_back_byte_for_byte(name: str) -> None:
    raw = stored(name)
    config, findings = CompressedConfig.from_checkpoint(raw)
    assert not findings
    assert config.to_json() == json.dumps(raw, indent=2, sort_keys=True)


def test_keys_nobody_knows_survive_in_every_place() -> None:
    raw = stored("ct-pack-int4-g64")
    raw["config_groups"]["group_0"]["weights"]["new_key"] = [1]
    raw["config_groups"]["group_0"]["other"] = {"a": 2}
    raw["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "x": None}
    raw["later"] = "value"
    config, findings = CompressedConfig.from_checkpoint(raw)
    assert [item.code for item in findings] == ["QM-CONFIG-004"]
    assert config.to_checkpoint() == raw


def test_a_written_config_says_what_readers_expect() -> None:
    written = CompressedConfig.from_user({"num_bits": 4, "group_size": 64}).to_checkpoint()
    peers = stored("ct-pack-int4-g64")
    assert written["config_groups"] == {
        "group_0": {**peers["config_groups"]["group_0"], "format": "pack-quantized"}
    }
    for key in ("format", "quant_method", "quantization_status", "kv_cache_scheme"):
        assert written[key] == peers[key]
    assert written["ignore"] == []


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"num_bits": 8, "strategy": "channel"}, "pack-quantized"),
        ({"num_bits": 8, "dynamic_activations": True}, "int-quantized"),
        ({"type": "float"}, "float-quantized"),
        ({"type": "float", "dynamic_activations": True}, "float-quantized"),
        ({"format": "naive-quantized", "num_bits": 8}, "naive-quantized"),
    ],
)
def test_the_format_follows_from_the_group(options: dict[str, Any], form: str) -> None:
    config = CompressedConfig.from_user(options)
    assert config.format == form == config.config_groups["group_0"].stores_as


def test_a_group_can_be_named() -> None:
    raw = {"config_groups": {"W4A16_ASYM": ["Linear"], "W8A8": ["re:.*down_proj"]}}
    config, _ = CompressedConfig.from_checkpoint({**raw, "format": "mixed-precision"})
    groups = config.to_checkpoint()["config_groups"]
    assert groups["W4A16_ASYM"] == {**NAMED["W4A16_ASYM"], "targets": ["Linear"]}
    assert config.config_groups["W8A8"].stores_as == "int-quantized"


def test_names_outrank_expressions_and_those_outrank_classes() -> None:
    groups = {
        str(bits): scheme({**WEIGHTS, "num_bits": bits}, targets=[target])
        for bits, target in ((4, "Linear"), (3, "re:model.*down"), (8, "model.0.down"))
    }
    config, _ = CompressedConfig.from_checkpoint({"config_groups": groups})

    def bits(name: str, cls: str = "Linear") -> int | None:
        found = config.scheme_for(name, cls)
        return found.weights.num_bits if found is not None and found.weights else None

    assert [bits("model.0.down"), bits("model.1.down"), bits("model.1.up")] == [8, 3, 4]
    assert bits("lm_head", "Embedding") is None
    assert {rule.action for rule in rules(config, "checkpoint")} == {"skip", "include"}


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ({"config_groups": {"g": {"weights": {"num_bit": 4}}}}, "config_groups.g.weights.num_bit"),
        ({"config_groups": {"g": {"target": ["Linear"]}}}, "config_groups.g.target"),
        ({"num_bits": "many"}, "config_groups.group_0.weights.num_bits"),
        ({"strategy": "group", "group_size": 0}, "config_groups.group_0.weights"),
        ({"strategy": "block"}, "config_groups.group_0.weights"),
        ({"dynamic_activations": "per token"}, "dynamic_activations"),
        ({"config_groups": [1]}, "config_groups"),
    ],
)
def test_a_users_mistake_is_named_with_its_place(raw: dict[str, Any], place: str) -> None:
    with pytest.raises(FindingsError) as caught:
        CompressedConfig.from_user(raw)
    assert place in {item.where for item in caught.value.findings}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": "marlin-24"}, "QM-CT-010"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "QM-CT-010"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "QM-CT-010"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "QM-CT-012"),
        (
            {
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": WEIGHTS},
                    "b": {"targets": ["Linear"], "weights": {**WEIGHTS, "group_size": 32}},
                }
            },
            "QM-CT-011",
        ),
        (
            {
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 4}}
                }
            },
            "QM-CT-013",
        ),
    ],
)
def test_what_is_not_computed_is_a_finding(
    tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = tmp_path / "copy"
    shutil.copytree(DATA / "ct-pack-int4-g64", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    assert code in {item.code for item in findings_of(folder)}


def findings_of(source: Path, method: Any = None) -> list[Finding]:
    try:
        return list(quantmill.plan(source, method).findings)
    except QuantmillError as error:
        return list(error.findings)


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("re:.*proj", "re:.*down_proj", "model.layers.0.mlp.down_proj"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("Linear", "re:.*down_proj", None),
        ("re:.*up_proj", "re:.*down_proj", None),
        ("re:.*proj", "model.layers.1.mlp.up_proj", None),
    ],
)
def test_two_groups_of_a_rank_that_claim_a_module_are_refused(
    tmp_path: Path, first: str, second: str, refused: str | None
) -> None:
    folder = write_tiny_llama(tmp_path / "float")
    groups = {
        "wide": {"targets": [first], "weights": {**WEIGHTS, "group_size": 32}},
        "narrow": {"targets": [second], "weights": {"num_bits": 8, "strategy": "channel"}},
    }
    method = {"quant_method": "compressed-tensors", "config_groups": groups}
    found = [item for item in findings_of(folder, method) if item.code == "QM-CT-011"]
    assert [item.where for item in found] == ([refused] if refused else [])
    assert all("wide" in item.cause and "narrow" in item.cause for item in found)
