"""Mixes: llama-quantize's choices for models of many shapes, overrides, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantmill.findings import QuantmillError
from quantmill.targeting.types import ModuleInfo, ParameterInfo
from quantmill_gguf.mixes import MIXES, MixOptions, ModelFacts, mix_named
from quantmill_gguf.tensor_types import choose, fallback

STORED: Any = json.loads((Path(__file__).parent / "data" / "mixes.json").read_text())
"""What llama-quantize chose: see ``benchmarks/interop_llamacpp.py``."""
LLAMA = ModelFacts("llama", layers=8, heads=4, kv_heads=2)
TENSORS = [
    ("token_embd.weight", (4096, 256), "F16"),
    ("output.weight", (4096, 256), "F16"),
    *(
        (f"blk.{layer}.{part}.weight", shape, "F16")
        for layer in range(8)
        for part, shape in (
            ("attn_q", (256, 256)),
            ("attn_v", (128, 256)),
            ("ffn_up", (896, 256)),
            ("ffn_down", (256, 896)),
        )
    ),
    ("output_norm.weight", (256,), "F32"),
]


def chosen(mix: str = "Q4_K_M", facts: ModelFacts = LLAMA, **options: Any) -> dict[str, str]:
    return choose(mix_named(mix), facts, TENSORS, MixOptions(**options))


@pytest.mark.parametrize("case", STORED["cases"])
def test_types_are_those_of_llama_quantize(case: str) -> None:
    stored = STORED["cases"][case]
    facts = ModelFacts(*stored["facts"])
    shapes = {name: tuple(shape) for name, shape in stored["tensors"].items()}
    listed = [(n, s, "F16" if len(s) > 1 else "F32") for n, s in reversed(shapes.items())]
    assert len(stored["types"]) >= 24
    for mix, letters in stored["types"].items():
        wanted = [STORED["letters"][letter] for letter in letters]
        assert choose(MIXES[mix], facts, listed) == dict(zip(shapes, wanted, strict=True)), mix


def test_names_are_found_in_any_case_and_short() -> None:
    assert mix_named("q4_k_m") is MIXES["Q4_K_M"] is mix_named("Q4_K")
    with pytest.raises(QuantmillError, match=r"QM-GGUF-031.*did you mean Q4_K_M"):
        mix_named("Q4_KM")


def test_the_head_and_the_embedding_can_be_given_types() -> None:
    types = chosen(output="Q8_0", embedding="Q5_1")
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q5_1")
    tied = [item for item in TENSORS if item[0] != "output.weight"]
    found = choose(mix_named("Q4_K_M"), LLAMA, tied, MixOptions(output="Q8_0"))
    assert found["token_embd.weight"] == "Q8_0"
    assert chosen(keep_output=True)["output.weight"] == "F16"
    with pytest.raises(QuantmillError, match=r"QM-GGUF-031.*did you mean Q8_0"):
        chosen(output="Q80")


def test_pure_is_one_type_for_all() -> None:
    types = chosen("Q4_K_M", pure=True)
    assert set(types.values()) == {"Q4_K", "Q5_0", "F32"}  # rows of 896 fall back
    assert types["blk.0.ffn_down.weight"] == "Q5_0"


def test_importance_changes_what_is_dared() -> None:
    assert chosen("Q4_0")["blk.0.ffn_down.weight"] == "Q4_0"
    assert chosen("Q4_0", importance=True)["blk.0.ffn_down.weight"] == "Q4_1"
    assert chosen("IQ4_NL")["blk.0.ffn_down.weight"] == "Q5_1"
    assert chosen("IQ4_NL", importance=True)["blk.0.ffn_down.weight"] == "IQ4_NL"


def test_patterns_override_the_mix() -> None:
    types = chosen(
        overrides=[
            ("ffn_down", "Q8_0"),
            ("layers:0,-1 & *.*.attn_v", "Q6_K"),
            ("role:attention", "Q5_K"),
            ("re:blk\\.3\\..*up", "F16"),
        ]
    )
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(8)} == {"Q8_0"}
    assert types["blk.7.attn_v.weight"] == "Q6_K" and types["blk.5.attn_v.weight"] == "Q5_K"
    assert types["blk.3.ffn_up.weight"] == "F16" and types["blk.4.ffn_up.weight"] == "Q4_K"
    assert types["output.weight"] == "Q6_K"


def test_patterns_may_use_the_names_of_the_model() -> None:
    name = "blk.2.attn_q.weight"
    path = "model.layers.2.self_attn.q_proj"
    weight = ParameterInfo(f"{path}.weight", (256, 256), "BF16")
    module = ModuleInfo(path, "linear", "Linear", {"weight": weight}, "attention", 2)
    types = chosen(overrides=[("q_proj", "Q8_0")], aliases={name: module})
    assert types[name] == "Q8_0" and types["blk.3.attn_q.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        ([("ffn_dwn", "Q8_0")], "QM-TARGET-010"),
        ([("output_norm", "Q8_0")], "QM-TARGET-010"),
        ([("re:(", "Q8_0")], "QM-TARGET-001"),
        ([("ffn_down", "Q8")], "QM-GGUF-031"),
        ([("ffn_down", "Q8_0"), ("ffn_down", "Q6_K")], "QM-TARGET-012"),
    ],
)
def test_overrides_that_can_not_be_meant_are_refused(overrides: Any, code: str) -> None:
    with pytest.raises(QuantmillError, match=code):
        chosen(overrides=overrides)


def test_rows_that_fill_no_blocks_fall_back() -> None:
    assert fallback("Q4_K", 512) == "Q4_K"
    assert [fallback(kind, 96) for kind in ("Q2_K", "Q5_K", "Q6_K", "IQ4_XS")] == [
        *("Q4_0", "Q5_1", "Q8_0", "IQ4_NL")
    ]
    assert fallback("Q6_K", 50) == fallback("Q8_0", 50) == "F16"


def test_facts_come_from_metadata() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 80,
        "llama.attention.head_count": [64, 64],
        "llama.attention.head_count_kv": 8,
        "llama.expert_count": "many",
    }
    facts = ModelFacts.of(metadata)
    assert facts == ModelFacts("llama", 80, 64, 8, 0) and facts.is_70b and facts.sharing == 8
    assert ModelFacts.of({}) == ModelFacts("", 0)
