"""Promises about a method's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import quantmill
from quantmill.api import make_job, method_schema
from quantmill.findings import FindingsError, QuantmillError
from quantmill.job import Selection
from quantmill.stages.configure import configure
from quantmill.testing.base import Conformance, attempt, errors_of, sound

__all__ = ["ConfigurationPromises"]


def _given(selection: Selection) -> dict[str, Any]:
    """What a user would write for the same config."""
    return selection.config.model_dump(exclude_defaults=True, by_alias=True)


class ConfigurationPromises(Conformance):
    """Strict with users, lenient with checkpoints, the same bytes again."""

    def test_the_config_round_trips_byte_for_byte(self, folder: Path, selection: Selection) -> None:
        text = selection.config.to_json()
        _, again = configure(make_job(folder), json.loads(text), "checkpoint")
        assert again.to_json() == text

    def test_a_checkpoint_names_the_first_quant_method(self, selection: Selection) -> None:
        if selection.method.quant_methods:
            stored = selection.config.to_checkpoint()
            assert stored["quant_method"] == selection.method.quant_methods[0]

    def test_the_config_is_frozen(self, selection: Selection) -> None:
        name = next(iter(type(selection.config).model_fields))
        with pytest.raises(ValidationError):
            setattr(selection.config, name, getattr(selection.config, name))

    def test_an_unknown_key_of_a_user_is_an_error(self, folder: Path) -> None:
        with pytest.raises(FindingsError) as caught:
            quantmill.plan(folder, {"method": self.method, self.bad_field: 1})
        assert "QM-CONFIG-001" in {item.code for item in errors_of(caught.value.findings)}

    def test_a_misspelt_key_is_suggested(self, selection: Selection) -> None:
        config_class = type(selection.config)
        right = max(config_class.field_names(), key=len)
        with pytest.raises(FindingsError) as caught:
            config_class.from_user({**_given(selection), right[:-1]: 1})
        found = [item for item in caught.value.findings if item.code == "QM-CONFIG-001"]
        assert found and f"did you mean {right}?" in found[0].cause

    def test_a_value_of_a_wrong_type_is_a_finding(self, selection: Selection) -> None:
        config_class = type(selection.config)
        refused = 0
        for name in config_class.field_names():
            raw = {**_given(selection), name: {"no": ["such", "value"]}}
            _, found = attempt(lambda raw=raw: config_class.from_user(raw))  # type: ignore[misc]
            refused += bool(found)
            assert not found or any(name in item.where for item in found), name
        assert refused, "no field has a type"

    def test_all_wrong_values_are_found_at_once(self, selection: Selection) -> None:
        config_class = type(selection.config)
        wrong: dict[str, Any] = {"no": ["such", "value"]}
        names = []
        properties = config_class.model_json_schema().get("properties", {})
        for name in config_class.field_names():
            if "object" in json.dumps(properties.get(name, {"type": "object"})):
                continue  # Of a structure that can't be taken apart, what follows is not known.
            _, found = attempt(
                lambda name=name: config_class.from_user({**_given(selection), name: wrong})  # type: ignore[misc]
            )
            names += [name] if found else []
        raw = {**_given(selection), **dict.fromkeys(names, wrong), self.bad_field: 1}
        _, found = attempt(lambda: config_class.from_user(raw))
        for name in (*names, self.bad_field):
            assert any(name in item.where or name in item.cause for item in found), name

    def test_a_pattern_that_matches_nothing_is_an_error(self, folder: Path) -> None:
        with pytest.raises(QuantmillError) as caught:
            quantmill.plan(folder, self.method, skip=["no.such.module"]).raise_errors()
        assert any("no.such.module" in str(item) for item in errors_of(caught.value.findings))

    def test_an_unknown_key_of_a_checkpoint_is_kept(
        self, folder: Path, selection: Selection
    ) -> None:
        stored = {**selection.config.to_checkpoint(), self.bad_field: [1]}
        job = make_job(folder)
        _, config = configure(job, stored, "checkpoint")
        assert config.to_checkpoint()[self.bad_field] == [1]
        assert any(item.code == "QM-CONFIG-004" for item in sound(job.findings))

    def test_fields_it_names_elsewhere_exist(self, selection: Selection) -> None:
        config_class = type(selection.config)
        named = {
            *config_class.runtime_fields,
            *(n for group in config_class.exclusive for n in group),
        }
        assert named <= set(config_class.model_fields)

    def test_kept_modules_stay_in_the_config(self, selection: Selection) -> None:
        kept = selection.config.keeping(["some.module"])
        # A dialect without a skip list may ignore them; one with a list must not lose any.
        if kept.to_checkpoint() != selection.config.to_checkpoint():
            assert "some.module" in kept.to_json()
            more = kept.keeping(["another.module"]).to_json()
            assert "some.module" in more and "another.module" in more

    def test_it_has_a_schema_with_a_description(self) -> None:
        schema = method_schema(self.method)
        assert schema["properties"] and schema["description"]
        json.dumps(schema)
