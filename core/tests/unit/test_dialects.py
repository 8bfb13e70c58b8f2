"""The peers' dialects mean in our language what they mean to the peers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from quantmill.targeting.dialects import (
    from_compressed_tensors,
    from_gptq_dynamic,
    from_hqq_dynamic,
    from_torchao_fqn,
    from_transformers_skip,
)
from quantmill.targeting.rules import decide
from quantmill.targeting.types import Decision, ModuleInfo, ParameterInfo, Rule

NAMES = [
    *(
        f"model.layers.{layer}.{part}"
        for layer in (0, 1, 10)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ),
    "lm_head",
]


def _module(name: str) -> ModuleInfo:
    weight = ParameterInfo(f"{name}.weight", (64, 64), "BF16", (f"{name}.weight",))
    role = "head" if name == "lm_head" else "mlp"
    return ModuleInfo(name, "linear", "Linear", {"weight": weight}, role)


def _decide(rules: Sequence[Rule]) -> dict[str, Decision]:
    made, findings = decide([_module(name) for name in NAMES], rules, kinds=("linear",))
    assert not findings.errors
    return {item.module: item for item in made}


def _kept(rules: Sequence[Rule]) -> set[str]:
    return {name for name, item in _decide(rules).items() if item.action == "keep"}


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("lm_head", {"lm_head"}),
        ("model.layers.1", {name for name in NAMES if ".1." in name} | {"lm_head"}),
        ("down_proj", {name for name in NAMES if "down" in name} | {"lm_head"}),
        (r"model\.layers\.\d\.mlp", {n for n in NAMES if "mlp" in n and ".10." not in n}),
    ],
)
def test_skip_lists_of_transformers(entry: str, kept: set[str]) -> None:
    assert _kept(from_transformers_skip([entry])) == kept | {"lm_head"}


def test_gptq_dynamic_takes_the_first_match() -> None:
    made = _decide(
        from_gptq_dynamic(
            {
                r"-:.*\.0\.mlp": {},
                r"+:.*\.0\..*": {"bits": 8},
                r".*q_proj": {"bits": 3, "group_size": 64},
            }
        )
    )
    assert made["model.layers.0.mlp.up_proj"].action == "keep"
    assert made["model.layers.0.self_attn.q_proj"].options == {"bits": 8}
    assert made["model.layers.1.self_attn.q_proj"].options == {"bits": 3, "group_size": 64}
    assert made["model.layers.1.mlp.up_proj"].options is None
    assert made["lm_head"].action == "keep", "options alone do not quantize the head"


def test_compressed_tensors_names_outrank_expressions_and_classes() -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "group_1": {"targets": [r"re:.*q_proj"], "weights": {"num_bits": 8}},
        "group_2": {"targets": ["model.layers.1.self_attn.q_proj"], "weights": {"num_bits": 2}},
    }
    made = _decide(from_compressed_tensors(groups, ["lm_head", r"re:.*\.10\."]))
    bits = {n: (d.options or {}).get("weights", {}).get("num_bits") for n, d in made.items()}
    assert bits["model.layers.0.mlp.up_proj"] == 4
    assert bits["model.layers.0.self_attn.q_proj"] == 8
    assert bits["model.layers.1.self_attn.q_proj"] == 2
    assert made["lm_head"].action == "keep"
    assert made["model.layers.10.self_attn.q_proj"].action == "keep"


def test_compressed_tensors_quantizes_the_head_unless_ignored_and_nothing_untargeted() -> None:
    assert _kept(from_compressed_tensors({"g": {"targets": ["Linear"]}}, [])) == set()
    only = from_compressed_tensors({"g": {"targets": [r"re:.*up_proj$"]}}, [])
    assert _kept(only) == {name for name in NAMES if "up_proj" not in name}


def test_torchao_names_then_expressions_in_order_then_the_default() -> None:
    value = {
        "_default": "int8",
        r"re:.*\.q_proj": "first",
        r"re:.*\.self_attn\..*": "second",
        "model.layers.1.self_attn.q_proj": "exact",
        "model.layers.0.mlp.up_proj": None,
    }
    made = _decide(from_torchao_fqn(value))
    config = {name: (item.options or {}).get("config") for name, item in made.items()}
    assert config["model.layers.0.self_attn.q_proj"] == "first"
    assert config["model.layers.0.self_attn.k_proj"] == "second"
    assert config["model.layers.1.self_attn.q_proj"] == "exact"
    assert config["model.layers.1.mlp.up_proj"] == "int8"
    assert made["model.layers.0.mlp.up_proj"].action == "keep"
    without = {key: item for key, item in value.items() if key != "_default"}
    assert "model.layers.1.mlp.up_proj" in _kept(from_torchao_fqn(without))


def test_hqq_dynamic_names_the_end_of_a_module() -> None:
    made = _decide(from_hqq_dynamic({"self_attn.q_proj": {"nbits": 8}}))
    assert made["model.layers.10.self_attn.q_proj"].options == {"nbits": 8}
    assert made["model.layers.10.self_attn.k_proj"].options is None
