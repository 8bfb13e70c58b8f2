"""The documentation says what the code says: helps, finding codes, hooks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from quantmill import hookspecs
from quantmill.cli import COMMANDS
from quantmill.host import default_host
from quantmill.registrations import resolve

ROOT = Path(__file__).resolve().parents[2]
Script = Callable[[str], ModuleType]
PACKAGES = (
    "quantmill",
    "quantmill_bnb",
    "quantmill_cpu",
    "quantmill_diffusers",
    "quantmill_transformers",
)
EVERY_CODE = """
import importlib.util, json, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(package.__path__, name + "."):
        if importlib.util.find_spec(found.name).origin.endswith(".py"):
            importlib.import_module(found.name)
from quantmill.findings import CODES
print(json.dumps({c.code: [c.severity.value, c.title, c.fallback] for c in CODES.values()}))
"""


@pytest.fixture(scope="module")
def pages(script: Script) -> ModuleType:
    """The code that generates the reference pages."""
    pytest.importorskip("mkdocs")
    return script("tools/mkdocs_hooks.py")


@pytest.mark.parametrize("name", [None, *sorted(COMMANDS)])
def test_the_page_of_the_command_line_holds_each_help(script: Script, name: str | None) -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert script("tools/cli_help.py").help_of(name) in page, "renew it: python tools/cli_help.py"


def test_every_code_is_in_the_findings(pages: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERY_CODE, *PACKAGES], capture_output=True, text=True, check=True
    )
    declared = json.loads(done.stdout)
    rows = {}
    for line in pages.findings_page().splitlines():
        match = re.fullmatch(r"\| `(QM-[A-Z0-9-]+)` \| ([a-z, ]+) \| (.+) \| `([\w.]+)` \|", line)
        if match is not None and match[4].partition(".")[0] in PACKAGES:
            rows[match[1]] = [match[2], match[3]]
    assert len(declared) > 50
    assert rows == {
        code: [severity + (", fallback" if fallback else ""), title.replace("|", "\\|")]
        for code, (severity, title, fallback) in declared.items()
    }


def test_every_hook_is_documented(pages: ModuleType) -> None:
    page = pages.hooks_page()
    names = [name for name in dir(hookspecs) if name.startswith("quantmill_")]
    assert sorted(re.findall(r"^### (quantmill_\w+)$", page, re.MULTILINE)) == names
    for name in names:
        section = page.split(f"### {name}\n")[1].split("\n### ")[0]
        assert f"def {name}(" in section
        prose = section.split("```")[2]
        assert len(prose.split()) > 3, f"{name} has no description"
    assert "``" not in page.replace("```", "") and ":class:" not in page
    headings = re.findall(r"^## (\w+)", page, re.MULTILINE)
    assert headings[0] == "Registration" and headings[-1] == "Observation"
    source = Path(hookspecs.__file__).read_text(encoding="utf-8")
    assert len(headings) == len(re.findall(r"^# --- ", source, re.MULTILINE)) >= 9


def test_every_field_of_every_method_is_in_the_reference(script: Script) -> None:
    page = (ROOT / "docs" / "reference" / "configs.md").read_text(encoding="utf-8")
    tool = script("tools/config_reference.py")
    assert tool.page() == page, "renew it: python tools/config_reference.py"
    for name, method in default_host().methods.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|", section, re.MULTILINE)
        fields = set(resolve(method.config).model_fields) - {"unknown"}
        assert fields <= set(rows), f"{name} lacks {fields - set(rows)}"
