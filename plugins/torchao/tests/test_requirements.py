"""What is said where torchao is absent, too old or too new."""

from __future__ import annotations

import importlib.metadata as metadata
import json

import pytest
from click.testing import CliRunner

from quantmill import host as hosts
from quantmill.cli.doctor import command
from quantmill.host import Host


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "not installed"),
        ("0.9.0", "version 0.9.0 is installed"),
        ("0.30.0", "version 0.30.0 is installed"),
    ],
)
def test_doctor_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
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
    assert "pip install" in found.fix and "torchao" in found.fix
    monkeypatch.setattr("quantmill.cli.doctor.default_host", Host)
    monkeypatch.setattr(hosts, "default_host", Host)
    done = CliRunner().invoke(command, ["--json", "--check"], standalone_mode=False)
    answer = json.loads(done.stdout)
    (row,) = [item for item in answer["plugins"] if item["name"] == "torchao"]
    assert row["status"] == "missing requirement" and words in row["reason"]
    assert "torchao" not in {item["name"] for item in answer["methods"]}
