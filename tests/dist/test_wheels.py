"""Built wheels in a clean environment. Run by ``tools/dist.sh``, which makes that environment."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        os.environ.get("QUANTMILL_DIST") != "1",
        reason="needs the built wheels in a clean environment: tools/dist.sh",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "quantmill": "quantmill",
    "quantmill-awq": "quantmill_awq",
    "quantmill-bnb": "quantmill_bnb",
    "quantmill-compressed-tensors": "quantmill_compressed_tensors",
    "quantmill-cpu": "quantmill_cpu",
    "quantmill-diffusers": "quantmill_diffusers",
    "quantmill-fp8": "quantmill_fp8",
    "quantmill-gguf": "quantmill_gguf",
    "quantmill-gptq": "quantmill_gptq",
    "quantmill-quanto": "quantmill_quanto",
    "quantmill-hqq": "quantmill_hqq",
    "quantmill-torchao": "quantmill_torchao",
    "quantmill-transformers": "quantmill_transformers",
    "quantmill-triton": "quantmill_triton",
}
PLUGINS = {name.removeprefix("quantmill-"): name for name in PACKAGES if name != "quantmill"}


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("quantmill")
    return subprocess.run(
        [str(script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", PACKAGES)
def test_the_installed_package_is_not_the_tree(name: str) -> None:
    assert metadata.version(name) == "0.1.0"
    location = metadata.distribution(name).locate_file(PACKAGES[name])
    assert not any(
        Path(str(location)).is_relative_to(ROOT / part)
        for part in ("core", "plugins", "integrations")
    )


@pytest.mark.parametrize("name", PACKAGES)
def test_the_wheel_holds_types_and_licence_and_no_tests(name: str) -> None:
    files = [str(file) for file in metadata.files(name) or ()]
    assert f"{PACKAGES[name]}/py.typed" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert not [file for file in files if file.startswith("tests/")]
    info = metadata.metadata(name)
    assert info["License-Expression"] == "Apache-2.0"
    assert info["Requires-Python"] == ">=3.11"


def test_each_plugin_has_its_entry_point() -> None:
    points = {
        point.name: (point.value, point.dist.name if point.dist else None)
        for point in metadata.entry_points(group="quantmill.plugins")
    }
    assert points == {name: (f"{PACKAGES[dist]}.plugin", dist) for name, dist in PLUGINS.items()}


def test_every_plugin_has_an_extra() -> None:
    extras = metadata.metadata("quantmill").get_all("Provides-Extra") or []
    assert set(PLUGINS) <= set(extras)


def test_help(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout


def test_plugins_are_found_and_ok(tmp_path: Path) -> None:
    done = command("plugins", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    rows = answer["plugins"] if isinstance(answer, dict) else answer
    status = {row["name"]: row["status"] for row in rows}
    assert {name: status.get(name) for name in PLUGINS} == dict.fromkeys(PLUGINS, "ok")
