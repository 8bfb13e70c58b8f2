"""Configs: torchao's own words, short ones, objects, and what is refused."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import torchao.quantization as ao
from torchao.core.config import config_from_dict, config_to_dict

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill.host import default_host
from quantmill.stages.select import parse_method
from quantmill.testing import write_tiny_llama
from quantmill_torchao.classes import CONFIGS, described
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.recipes import read


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_fields_defaults_and_versions_are_torchaos(name: str) -> None:
    assert described(name, {}) == config_to_dict(getattr(ao, name)())


@pytest.mark.parametrize(
    ("name", "fields", "theirs"),
    [
        (
            "Int8WeightOnlyConfig",
            {"granularity": "PerGroup(64)"},
            lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64)),
        ),
        (
            "IntxWeightOnlyConfig",
            {"weight_dtype": "int3", "granularity": "PerAxis(0)", "mapping_type": "ASYMMETRIC"},
            lambda: ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int3,
                granularity=ao.PerAxis(0),
                mapping_type=ao.MappingType.ASYMMETRIC,
            ),
        ),
        (
            "Float8DynamicActivationFloat8WeightConfig",
            {"granularity": "PerRow", "activation_value_ub": 1200.0},
            lambda: ao.Float8DynamicActivationFloat8WeightConfig(
                granularity=ao.PerRow(), activation_value_ub=1200.0
            ),
        ),
    ],
)
def test_short_words_make_what_torchao_makes(name: str, fields: Any, theirs: Any) -> None:
    ours = TorchaoConfig.from_user({"quant_type": name, **fields})
    assert ours.entry == config_to_dict(theirs())
    assert config_to_dict(config_from_dict(ours.entry)) == ours.entry


def test_torchaos_objects_are_methods() -> None:
    request = parse_method(ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()), default_host())
    assert request.raw is not None
    config = TorchaoConfig.from_user(request.raw)
    assert config.recipe.grain.kind == "tensor"


def test_what_is_written_is_read_again_with_the_same_bytes() -> None:
    for name in CONFIGS:
        if name == "Float8DynamicActivationInt4WeightConfig":
            continue
        config = TorchaoConfig.from_user({"quant_type": name})
        again, findings = TorchaoConfig.from_checkpoint(json.loads(config.to_json()))
        assert again.to_json() == config.to_json() and not findings


def _default(entry: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": entry}}


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (_default({"_type": "Int9WeightOnlyConfig", "_version": 2, "_data": {}}), "Int9"),
        (_default({"_type": "Int8WeightOnlyConfig", "_version": 7, "_data": {}}), "_version 7"),
        (_default({"_version": 2}), "_type"),
        (_default({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": 3}), "_data"),
        ({"quant_type": "int8_weight_only"}, "no longer reads"),
        ({"quant_type": {"other": {}}}, "default"),
        ({"quant_type": "Int8WeightOnlyConfig", "granularity": "PerMoon"}, "granularity"),
        ({"quant_type": "Int8WeightOnlyConfig", "granularity": "PerGroup(0)"}, "group_size"),
        ({"quant_type": "Int4WeightOnlyConfig", "group_size": -1}, "group_size"),
        (
            {"quant_type": "Int4WeightOnlyConfig", "int4_packing_format": "PRESHUFFLED"},
            "PRESHUFFLED",
        ),
        (
            {
                "quant_type": "IntxWeightOnlyConfig",
                "intx_packing_format": "OPAQUE_TORCHAO_AUTO",
            },
            "opaque",
        ),
        ({"quant_type": "IntxWeightOnlyConfig", "weight_dtype": "int9"}, "weight_dtype"),
        ({"quant_type": "Float8DynamicActivationInt4WeightConfig"}, "preshuffled"),
        (_default({"_type": "FqnToConfig", "_version": 1, "_data": {}}), "no module"),
    ],
)
def test_what_is_refused_says_why(raw: dict[str, Any], word: str) -> None:
    with pytest.raises(FindingsError) as caught:
        TorchaoConfig.from_user(raw)
    found = caught.value.findings
    assert any(word in item.cause for item in found), found
    assert all(item.where and item.fix for item in found)


def test_a_field_of_another_config_is_refused() -> None:
    with pytest.raises((FindingsError, ValueError), match=r"group_sze"):
        TorchaoConfig.from_user({"quant_type": "Int4WeightOnlyConfig", "group_sze": 3})
    with pytest.raises(FindingsError) as caught:
        TorchaoConfig.from_user({"quant_type": "Int4WeightOnlyConfig", "weight_dtype": "int4"})
    assert "no field 'weight_dtype'" in caught.value.findings[0].cause


def test_options_per_module_are_an_fqn_to_config(tmp_path: Any) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    method = {
        "method": "torchao-int8wo",
        "assign": {"down_proj": "torchao-intx4wo:granularity=PerGroup(32)"},
    }
    quantmill.quantize(source, tmp_path / "out", method)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    entry = stored["quant_type"]["default"]
    assert entry["_type"] == "FqnToConfig"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert config_to_dict(config_from_dict(entry)) == entry
    plan = quantmill.plan(tmp_path / "out")
    forms = {item.name: item.form for item in plan.modules if item.action == "quantize"}
    assert "4-bit" in forms["model.layers.0.mlp.down_proj"]
    assert "8-bit" in forms["model.layers.0.mlp.up_proj"]
    assert not [item for item in plan.findings if item.severity.value == "error"]


def test_an_fqn_to_config_decides_by_name(tmp_path: Any) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    config = ao.FqnToConfig(
        {
            "model.layers.0.mlp.up_proj": ao.Int8WeightOnlyConfig(),
            r"re:.*\.down_proj": ao.Float8WeightOnlyConfig(),
            r"re:.*\.gate_proj": None,
        }
    )
    plan = quantmill.plan(source, config)
    forms = {item.name: (item.action, item.form) for item in plan.modules}
    assert forms["model.layers.0.mlp.up_proj"][0] == "quantize"
    assert "scaled_float" in forms["model.layers.1.mlp.down_proj"][1]
    assert forms["model.layers.0.mlp.gate_proj"][0] == "keep"
    assert forms["model.layers.1.self_attn.q_proj"][0] == "keep"


def test_an_unknown_type_in_a_checkpoint_is_an_error(tmp_path: Any) -> None:
    source = write_tiny_llama(tmp_path / "float")
    quantmill.quantize(source, tmp_path / "out", "torchao-int8wo")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_type"]["default"]["_type"] = "Int5Config"
    path.write_text(json.dumps(config))
    with pytest.raises(QuantmillError) as caught:
        quantmill.plan(tmp_path / "out")
    (finding,) = caught.value.findings
    assert finding.code == "QM-CONFIG-005"
    assert "'Int5Config' is not known; known are" in finding.cause and "…" in finding.cause
    assert read(described("Int8WeightOnlyConfig", {})).bits == 8
