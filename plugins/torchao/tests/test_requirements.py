"""What is said where torchao is absent, too old or too new."""

from __future__ import annotations

import importlib.metadata as metadata
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import quantmill
from quantmill import host as hosts
from quantmill.cli import cli
from quantmill.findings import QuantmillError
from quantmill.host import Host
from quantmill.testing import write_tiny_llama


def write_stored(folder: Path) -> Path:
    """A checkpoint that says it is torchao's."""
    write_tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "not installed"),
        ("0.9.0", "version 0.9.0 is installed"),
        ("0.30.0", "version 0.30.0 is installed"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None, words: str
) -> None:
    real = metadata.version

    def pretended(name: str) -> str:
        if name != "torchao":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretended)
    found = Host().plugins["torchao"]
    assert found.status.value == "missing requirement"
    assert "torchao" in found.reason and words in found.reason
    assert found.fix == 'pip install "torchao<0.19,>=0.17"'
    monkeypatch.setattr("quantmill.api.default_host", Host)
    for source, method in ((write_stored(tmp_path / "stored"), None), (tmp_path, "torchao-int8wo")):
        with pytest.raises(QuantmillError) as caught:
            quantmill.plan(source, method)
        (finding,) = caught.value.findings
        assert words in finding.cause and finding.fix == found.fix
    monkeypatch.setattr("quantmill.cli.doctor.default_host", Host)
    monkeypatch.setattr(hosts, "default_host", Host)
    done = CliRunner().invoke(cli, ["doctor", "--json", "--check"], standalone_mode=False, obj={})
    answer = json.loads(done.stdout)
    (row,) = [item for item in answer["plugins"] if item["name"] == "torchao"]
    assert row["status"] == "missing requirement" and words in row["reason"]
    assert "torchao" not in {item["name"] for item in answer["methods"]}
