"""Commands that need no backend: plugins, doctor, kernels, schema, inspect."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantmill
from quantmill.host import Host, PluginInfo, Status
from quantmill.registrations import Capabilities, Method, Preset, Requirement
from quantmill.testing import write_tiny_llama

Cli = Callable[..., Any]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host of two plugins, one of them broken, and a method that lacks a library."""
    made = Host(discover=False)
    made.plugins["good"] = PluginInfo("good", "quantmill-good", "1.0", "good.plugin")
    made.plugins["bad"] = PluginInfo(
        "bad", "quantmill-bad", "2.0", "bad.plugin", Status.BROKEN, "it raised", "update it"
    )
    method = Method(
        "m",
        "a method",
        "a:B",
        "a:B",
        "a:B",
        Capabilities(on_the_fly=True, devices=("cpu", "npu")),
        presets=(Preset("m-4", {}),),
        requirements=(Requirement("no-such-library", ">=2", "computes", optional=True),),
    )
    made._registered["methods"].append(("good", method))
    for name in ("plugins", "doctor", "kernels"):
        monkeypatch.setattr(f"quantmill.cli.{name}.default_host", lambda: made)
    return made


def test_plugins_and_their_status(cli: Cli, host: Host) -> None:
    result = cli("plugins")
    assert result.code == 0 and result.err == ""
    assert "quantmill-good 1.0" in result.out
    assert "it raised. update it" in result.out and "broken" in result.out


def test_plugins_as_json(cli: Cli, host: Host) -> None:
    result = cli("plugins", "--json")
    found = {item["name"]: item for item in result.json["plugins"]}
    assert found["good"]["status"] == "ok" and found["bad"]["fix"] == "update it"


def test_strict_plugins(cli: Cli, host: Host) -> None:
    assert cli("plugins", "--strict").code == 3
    assert cli("plugins", "--strict", "--json").json["plugins"]
    host.plugins["bad"].status = Status.DISABLED
    assert cli("plugins", "--strict").code == 0


def test_no_plugin_at_all(cli: Cli, host: Host) -> None:
    host.plugins.clear()
    result = cli("plugins")
    assert result.code == 0 and "pip install" in result.out
    assert cli("plugins", "--json").json == {"plugins": []}


def test_doctor(cli: Cli, host: Host) -> None:
    text = cli("doctor")
    assert text.code == 0
    for words in ("python", "m-4", "no-such-library>=2", "it raised"):
        assert words in text.out
    data = cli("doctor", "--json").json
    (method,) = data["methods"]
    assert method["devices"] == ["cpu"] and method["can"] == ["on_the_fly"]
    assert method["missing"][0]["fix"] == 'pip install "no-such-library>=2"'
    assert data["machine"]["cores"] >= 1 and data["findings"] == []


def test_doctor_checks(cli: Cli, host: Host) -> None:
    assert cli("doctor", "--check").code == 3
    host._registered["methods"].clear()
    assert cli("doctor", "--check").code == 3, "a broken plugin is something missing"
    del host.plugins["bad"]
    assert cli("doctor", "--check", "--json").code == 0


def test_schema_of_an_unknown_method(cli: Cli) -> None:
    result = cli("schema", "no-such-method", "--json")
    assert result.code == 1 and result.codes == ["QM-SELECT-001"]
    text = cli("schema", "no-such-method")
    assert text.code == 1 and "fix:" in text.err and text.out == ""


def test_a_schema_into_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantmill, "method_schema", lambda name: {"b": 1, "a": 2}, raising=False)
    path = tmp_path / "schema.json"
    assert cli("schema", "m", "--out", path).out == f"wrote {path}\n"
    assert path.read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    assert cli("schema", "m", "--out", path, "--json").json == {"written": str(path)}
    missing = cli("schema", "m", "--out", tmp_path / "no" / "such" / "folder", "--json")
    assert missing.code == 1 and missing.codes == ["QM-CLI-002"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model", shards=2)


def test_inspect_joins_what_repeats(cli: Cli, folder: Path) -> None:
    result = cli("inspect", folder)
    assert result.code == 0
    row = next(line for line in result.out.splitlines() if ".mlp.up_proj" in line)
    assert row.split() == [
        "model.layers.*.mlp.up_proj.weight",
        "2",
        "BF16",
        "128x64",
        "32.00",
        "KiB",
    ]
    assert "21 tensors in 2 files" in result.out


def test_inspect_every_tensor(cli: Cli, folder: Path) -> None:
    result = cli("inspect", folder, "--tensors")
    assert result.out.count(".mlp.up_proj.weight") == 2 and "layers.*" not in result.out


def test_inspect_as_json(cli: Cli, folder: Path) -> None:
    data = cli("inspect", folder, "--json").json
    config = json.loads((folder / "config.json").read_text())
    assert len(data["tensors"]) == 3 + 9 * config["num_hidden_layers"]
    assert data["totals"]["bytes"] == sum(item["bytes"] for item in data["tensors"])
    assert data["totals"]["files"] == 2 and data["quantization"] is None


def test_inspect_of_a_format_nobody_reads(cli: Cli, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "quip"}}))
    result = cli("inspect", folder)
    assert result.code == 1 and "QM-CONFIG-010" in result.err
    assert "21 tensors" in result.out, "what can be read is shown all the same"
    data = cli("inspect", folder, "--json").json
    assert [item["code"] for item in data["findings"]] == ["QM-CONFIG-010"]


def test_a_tensor_with_an_evil_name(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({"evil\x1b[2Jname": entry}).encode()
    raw = struct.pack("<Q", len(header)) + header + b"\0"
    (folder / "model.safetensors").write_bytes(raw)
    result = cli("inspect", folder)
    assert result.code == 0
    assert "\x1b" not in result.out and r"evil\x1b[2Jname" in result.out


@pytest.mark.parametrize("arguments", [["inspect"], ["plan"]])
def test_a_source_that_is_not_there(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    result = cli(*arguments, tmp_path / "nowhere", "--json")
    assert result.code == 1 and result.codes == ["QM-CKPT-001"] and result.err == ""


@pytest.mark.parametrize("device", ["nonsense", "cuda:77"])
def test_a_device_that_is_not_there(cli: Cli, folder: Path, device: str) -> None:
    pytest.importorskip("quantmill_bnb")
    result = cli("plan", folder, "bnb-nf4", "--device", device, "--json")
    assert result.code == 1
    assert any(item["severity"] == "error" for item in result.json["findings"])
    assert "Traceback" not in result.err


def test_a_plan_s_exit_code_is_its_findings_(cli: Cli, folder: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    assert cli("plan", folder, "bnb-nf4").code == 0
    bad = cli("plan", folder, "bnb-nf4", "--skip", "no_such_module", "--json")
    assert bad.code == 1 and "QM-TARGET-010" in bad.codes and bad.json["modules"]
    assert cli("plan", folder, "bnb-nf4", "--skip", "no_such_module", "--allow-unmatched").code == 0


def test_a_plan_of_several_methods_shows_which(cli: Cli, folder: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    method = json.dumps({"method": "bnb-nf4", "assign": {"role:attention": "bnb-int8"}})
    result = cli("plan", folder, method)
    assert result.code == 0
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("model.")}
    assert "bnb-int8" in rows["model.layers.*.self_attn.q_proj"]
    assert "bnb-int8" not in rows["model.layers.*.mlp.up_proj"]
