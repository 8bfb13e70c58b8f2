"""Every ``quant_method`` of transformers is read, or refused with advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import quantmill
from quantmill.findings import QuantmillError
from quantmill.host import default_host
from quantmill.testing import write_tiny_llama
from quantmill_transformers.registry import KEYS, REFUSED, SAME

Script = Callable[[str], ModuleType]

ROOT = Path(__file__).parents[2]


def test_the_keys_are_those_of_the_installed_transformers() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert sorted(KEYS) == sorted(AUTO_QUANTIZER_MAPPING)


def test_each_key_is_read_or_refused_and_not_both() -> None:
    read = {
        name
        for dialect in default_host().dialects
        if not dialect.refusal[0]
        for name in dialect.quant_methods
    }
    for key in KEYS:
        assert (SAME.get(key, key) in read) != (key in REFUSED), key


def test_the_documented_table_has_every_key(script: Script) -> None:
    pytest.importorskip("mkdocs")
    page = script("tools/mkdocs_hooks.py").registry_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(KEYS)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refusal_says_why_and_what_to_do(key: str, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": key}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantmillError) as caught:
        quantmill.plan(source)
    (found,) = caught.value.findings
    assert found.where == "quantization_config" and found.code == "QM-CONFIG-010"
    assert REFUSED[key][0] in found.cause and found.fix == REFUSED[key][1]
