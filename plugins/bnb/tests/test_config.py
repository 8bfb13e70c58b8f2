"""Configs: what contradicts itself is refused with all findings; what a peer wrote comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from quantmill.findings import FindingsError
from quantmill_bnb.config import BnbConfig

FOUR = {"load_in_4bit": True}
EIGHT = {"load_in_8bit": True}
# As transformers 5 writes BitsAndBytesConfig(load_in_4bit=True, ...).
WRITTEN: dict[str, Any] = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def codes(raw: dict[str, Any]) -> set[str]:
    with pytest.raises(FindingsError) as caught:
        BnbConfig.from_user(raw)
    for finding in caught.value.findings:
        assert finding.where and finding.cause and finding.fix
    return {finding.code for finding in caught.value.findings}


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({}, ("QM-CONFIG-002",)),
        ({"load_in_4bit": False, "load_in_8bit": False}, ("QM-CONFIG-002",)),
        ({"bnb_4bit_quant_type": "nf4"}, ("QM-CONFIG-002",)),
        ({**FOUR, **EIGHT}, ("QM-CONFIG-003",)),
        ({"_load_in_4bit": True, **EIGHT}, ("QM-CONFIG-003",)),
        ({**EIGHT, "bnb_4bit_use_double_quant": True}, ("QM-CONFIG-003",)),
        ({**FOUR, "bnb_4bit_quant_type": "nf5"}, ("QM-CONFIG-002",)),
        ({**FOUR, "bnb_4bit_compute_dtype": "int8"}, ("QM-CONFIG-002",)),
        ({**FOUR, "bnb_4bit_quant_storage": "float64"}, ("QM-CONFIG-002",)),
        ({**FOUR, "bnb_4bit_blocksize": 48}, ("QM-CONFIG-002",)),
        ({**FOUR, "bnb_4bit_blocksize": 8192}, ("QM-CONFIG-002",)),
        ({**EIGHT, "llm_int8_threshold": -1.0}, ("QM-CONFIG-002",)),
        ({**EIGHT, "llm_int8_skip_modules": "lm_head"}, ("QM-CONFIG-002",)),
        ({**FOUR, "bnb_4bit_quant_typ": "nf4"}, ("QM-CONFIG-001",)),
        # All at once, and not one after the other.
        (
            {**FOUR, **EIGHT, "bnb_4bit_quant_type": "nf5", "bits": 4},
            ("QM-CONFIG-001", "QM-CONFIG-002", "QM-CONFIG-003"),
        ),
    ],
    ids=str,
)
def test_contradictions_are_refused(raw: dict[str, Any], found: tuple[str, ...]) -> None:
    assert codes(raw) == set(found)


def test_a_misspelt_field_is_suggested() -> None:
    with pytest.raises(FindingsError, match="did you mean bnb_4bit_use_double_quant"):
        BnbConfig.from_user({**FOUR, "bnb_4bit_use_double_quants": True})


def test_defaults_are_the_peers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    ours = BnbConfig.from_user(FOUR).to_checkpoint()
    assert {key: ours.get(key, "absent") for key in theirs} == theirs


def test_defaults_of_double_quantization() -> None:
    config = BnbConfig.from_user(FOUR)
    assert not config.bnb_4bit_use_double_quant and config.bnb_4bit_blocksize == 64
    assert config.bnb_4bit_quant_type == "fp4" and config.summary() == "FP4, blocks of 64"
    nested = BnbConfig.from_user({**FOUR, "bnb_4bit_use_double_quant": True})
    assert nested.summary() == "FP4, blocks of 64, double quantization"
    assert BnbConfig.from_user(EIGHT).summary() == "LLM.int8"


@pytest.mark.parametrize("name", ["bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"])
def test_dtypes_may_be_given_as_torch_has_them(name: str) -> None:
    for value in (torch.bfloat16, "torch.bfloat16", "bfloat16"):
        assert getattr(BnbConfig.from_user({**FOUR, name: value}), name) == "bfloat16"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llm_int8_skip_modules": ["lm_head", "ein.modül"]},
        {"bnb_4bit_quant_storage": "bfloat16"},
        {"something_of_tomorrow": {"b": [1, 2], "a": None}},
    ],
    ids=str,
)
def test_what_is_read_is_written_byte_for_byte(changes: dict[str, Any]) -> None:
    raw = {**WRITTEN, **changes}
    text = json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False)
    config, findings = BnbConfig.from_checkpoint(json.loads(text))
    assert config.to_json() == text
    assert [item.code for item in findings] == ["QM-CONFIG-004"] * ("something_of_tomorrow" in raw)
    again, _ = BnbConfig.from_checkpoint(json.loads(config.to_json()))
    assert again == config and again.to_json() == text


def test_the_private_flags_alone_tell_the_bits() -> None:
    raw = {key: value for key, value in WRITTEN.items() if not key.startswith("load_in")}
    config, _ = BnbConfig.from_checkpoint(raw)
    assert config.load_in_4bit and not config.load_in_8bit


def test_an_empty_skip_list_is_none() -> None:
    config, _ = BnbConfig.from_checkpoint({**WRITTEN, "llm_int8_skip_modules": []})
    assert config.llm_int8_skip_modules is None


def test_a_flag_that_a_peer_ignores_is_no_reason_to_refuse_its_checkpoint() -> None:
    eight = {"load_in_4bit": False, "_load_in_4bit": False, **EIGHT, "_load_in_8bit": True}
    config, findings = BnbConfig.from_checkpoint({**WRITTEN, **eight})
    assert not findings and config.load_in_8bit
    assert config.to_checkpoint() == {**WRITTEN, **eight}


def test_a_checkpoint_with_both_widths_is_refused() -> None:
    with pytest.raises(FindingsError, match="QM-CONFIG-003"):
        BnbConfig.from_checkpoint({**WRITTEN, **EIGHT})


def test_a_checkpoint_with_an_invalid_value_is_refused() -> None:
    with pytest.raises(FindingsError, match="QM-CONFIG-005"):
        BnbConfig.from_checkpoint({**WRITTEN, "bnb_4bit_quant_type": "nf5"})
