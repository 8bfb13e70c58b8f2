"""Typed configs: strict for users, lenient for checkpoints, byte-stable as text."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from quantmill.config import MethodConfig, dtype_name, suggestion
from quantmill.findings import Finding, FindingsError, Severity


class PaintConfig(MethodConfig):
    """A config with one field of every kind that matters."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"compute"})
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("matte", "shiny", "glow"),)

    bits: int = Field(4, ge=2, le=8)
    matte: bool = False
    shiny: bool = False
    glow: bool = Field(False, alias="isGlowing")
    compute: Literal["float32", "bfloat16"] = "float32"
    threshold: float = 6.0
    skip: list[str] | None = None
    block: int = Field(64, exclude=True)

    @field_validator("compute", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)


def refused(raw: dict[str, Any], *, stored: bool = False) -> list[Finding]:
    with pytest.raises(FindingsError) as caught:
        PaintConfig.from_checkpoint(raw) if stored else PaintConfig.from_user(raw)
    return list(caught.value.findings)


def test_a_users_config_is_typed_and_frozen() -> None:
    config = PaintConfig.from_user(
        {"quant_method": "paint", "method": "paint", "bits": 8, "compute": "torch.bfloat16"}
    )
    assert (config.bits, config.compute, config.skip) == (8, "bfloat16", None)
    with pytest.raises(ValidationError, match="frozen"):
        config.bits = 4  # type: ignore[misc]
    assert PaintConfig.from_user({}) == PaintConfig()


def test_an_unknown_key_of_a_user_is_an_error_with_a_suggestion() -> None:
    (typo,) = refused({"bitss": 4})
    assert (typo.code, typo.where) == ("QM-CONFIG-001", "bitss")
    assert "did you mean bits?" in typo.cause
    (far,) = refused({"zzz": 4})
    assert "PaintConfig" in far.cause and "threshold" in far.fix and "isGlowing" in far.fix


def test_the_field_for_unknown_keys_is_not_a_users() -> None:
    (finding,) = refused({"unknown": {"a": 1}})
    assert (finding.code, finding.where) == ("QM-CONFIG-001", "unknown")


def test_every_mistake_is_reported_at_once() -> None:
    findings = refused({"bitss": 1, "bits": 99, "compute": "int3", "matte": True, "shiny": True})
    assert sorted((item.code, item.where) for item in findings) == [
        ("QM-CONFIG-001", "bitss"),
        ("QM-CONFIG-002", "bits"),
        ("QM-CONFIG-002", "compute"),
        ("QM-CONFIG-003", "matte and shiny"),
    ]
    assert all(item.severity is Severity.ERROR and item.fix for item in findings)
    (bits,) = (item for item in findings if item.where == "bits")
    assert "bits=99" in bits.cause and "8" in bits.cause


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({"matte": True, "shiny": True}, "matte and shiny"),
        ({"matte": True, "isGlowing": True}, "matte and glow"),
        ({"matte": "true", "shiny": 1, "glow": True}, "matte and shiny and glow"),
        ({"matte": True, "shiny": False}, None),
        ({"matte": True, "shiny": "false"}, None),
        ({"matte": "no", "isGlowing": "yes"}, None),
    ],
)
def test_exclusive_options_by_what_they_mean(raw: dict[str, Any], names: str | None) -> None:
    if names is None:
        assert PaintConfig.from_user(raw) == PaintConfig.from_checkpoint(raw)[0]
        return
    for stored in (False, True):
        (finding,) = refused(raw, stored=stored)
        assert (finding.code, finding.where) == ("QM-CONFIG-003", names)


def test_a_checkpoints_unknown_keys_are_found_and_kept() -> None:
    raw = {"bits": 8, "new_key": {"deep": [1, None]}, "unknown": "yes", "quant_method": "paint"}
    config, findings = PaintConfig.from_checkpoint(raw)
    assert [(item.code, item.where, item.severity) for item in findings] == [
        ("QM-CONFIG-004", "quantization_config.new_key", Severity.WARNING),
        ("QM-CONFIG-004", "quantization_config.unknown", Severity.WARNING),
    ]
    written = config.to_checkpoint()
    assert written["new_key"] == {"deep": [1, None]} and written["unknown"] == "yes"
    assert "new_key" not in repr(config) and "new_key" not in config.summary()


def test_a_checkpoints_invalid_value_is_an_error() -> None:
    (finding,) = refused({"bits": "many", "new_key": 1}, stored=True)
    assert (finding.code, finding.where) == ("QM-CONFIG-005", "bits")
    (finding,) = refused({"bits": ["many"] * 100}, stored=True)
    assert "integer" in finding.cause and len(finding.cause) < 200


def test_a_field_with_an_alias_is_read_by_both_names_and_written_by_the_peers() -> None:
    for name in ("glow", "isGlowing"):
        config, findings = PaintConfig.from_checkpoint({name: True})
        assert config.glow and findings == []
        assert PaintConfig.from_user({name: True}) == config
    assert config.to_checkpoint()["isGlowing"] is True
    assert "glow" not in config.to_checkpoint()


def test_fields_that_tensors_tell_are_not_written() -> None:
    assert "block" not in PaintConfig(block=128).to_checkpoint()


def test_the_summary_shows_what_differs_from_the_defaults() -> None:
    assert PaintConfig().summary() == ""
    assert PaintConfig(threshold=0.0, bits=8).summary() == "bits=8, threshold=0.0"


keys = st.text(max_size=8).filter(
    lambda key: key not in {*PaintConfig.field_names(), "quant_method", "method"}
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
known = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.integers(2, 8),
        "isGlowing": st.booleans(),
        "compute": st.sampled_from(["float32", "torch.bfloat16"]),
        "threshold": st.floats(allow_nan=False),
        "skip": st.none() | st.lists(st.text(max_size=8), max_size=3),
    },
)


@given(known, st.dictionaries(keys, values, max_size=4))
def test_json_is_byte_stable_and_keeps_every_key(
    fields: dict[str, Any], unknown: dict[str, Any]
) -> None:
    config, _ = PaintConfig.from_checkpoint({**fields, **unknown})
    text = config.to_json()
    again, _ = PaintConfig.from_checkpoint(json.loads(text))
    assert again.to_json().encode() == text.encode()
    data = json.loads(text)
    assert {key: data[key] for key in unknown} == unknown
    shuffled, _ = PaintConfig.from_checkpoint(dict(reversed({**fields, **unknown}.items())))
    assert shuffled.to_json() == text


def test_json_is_sorted_and_readable() -> None:
    text = PaintConfig(skip=["naïve"]).to_json()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert "naïve" in text and text.startswith('{\n  "bits": 4,')


def test_the_schema_describes_the_fields() -> None:
    schema = PaintConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["bits"] == {
        "default": 4,
        "maximum": 8,
        "minimum": 2,
        "title": "Bits",
        "type": "integer",
    }
    assert schema["properties"]["compute"]["enum"] == ["float32", "bfloat16"]
    json.dumps(schema)


def test_dtype_names() -> None:
    torch = pytest.importorskip("torch")
    for value in (torch.bfloat16, "torch.bfloat16", "bfloat16"):
        assert dtype_name(value) == "bfloat16"
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
    assert dtype_name(None) is None
    assert dtype_name(7) == 7


def test_suggestions_only_for_close_words() -> None:
    assert suggestion("bit", ["bits", "skip"]) == "did you mean bits?"
    assert suggestion("zzz", ["bits", "skip"]) == ""
    assert suggestion("bits", []) == ""


# --- A real one, where its plugin is installed --------------------------------------------------


@pytest.mark.parametrize("mode", ["load_in_4bit", "load_in_8bit"])
def test_bnb_reads_and_writes_every_field_of_its_peer(mode: str) -> None:
    ours = pytest.importorskip("quantmill_bnb.config").BnbConfig
    if find_spec("bitsandbytes") is None:  # the peer's config asks for its version
        pytest.skip("bitsandbytes is not installed")
    peer = pytest.importorskip("transformers").BitsAndBytesConfig(
        **{mode: True},
        llm_int8_threshold=3.5,
        llm_int8_skip_modules=["lm_head", "score"],
        bnb_4bit_compute_dtype="bfloat16",
    )
    theirs = json.loads(peer.to_json_string(use_diff=False))
    config = ours.from_user(theirs)
    stored, findings = ours.from_checkpoint(theirs)
    assert stored == config and findings == []
    assert {key: config.to_checkpoint().get(key, "missing") for key in theirs} == theirs
    assert ours.from_user(peer.to_dict()) == config


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "QM-CONFIG-003"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": True}, "QM-CONFIG-003"),
        ({"load_in_4bit": True, "bnb_4bit_blocksize": 65}, "QM-CONFIG-002"),
        ({"load_in_4bit": True, "bnb_4bit_quant_tpye": "nf4"}, "QM-CONFIG-001"),
        ({"bnb_4bit_quant_type": "nf4"}, "QM-CONFIG-002"),
    ],
)
def test_bnb_refuses(raw: dict[str, Any], code: str) -> None:
    ours = pytest.importorskip("quantmill_bnb.config").BnbConfig
    with pytest.raises(FindingsError) as caught:
        ours.from_user(raw)
    assert [item.code for item in caught.value.findings] == [code]
