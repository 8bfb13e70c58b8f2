"""The tables of ``benchmarks/``: one command each, with the peers that are absent named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("QUANTMILL_")
    }
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


class Page(HTMLParser):
    """Tags that are opened and closed, addresses, text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tables_and_absent_peers_are_listed() -> None:
    done = benchmarks()
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert tables == ["load", "quantize", "kernels", "quality", "memory", "startup", "peers"]
    assert "GPTQModel: absent, no --peer-python, no QUANTMILL_PEER_PYTHON" in done.stdout
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    named = {word for line in done.stdout.splitlines() for word in line.split("(")[1:]}
    assert {word.partition(")")[0] for word in named} <= scripts


def test_startup(tmp_path: Path) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    done = benchmarks(
        "startup", "--quick", "--only", "startup.py", "--repeats", "2",
        "--json", str(figures), "--page", str(page),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "page.html"]
    document: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    (step,) = document["steps"]
    assert (document["table"], document["repeats"], step["status"]) == ("startup", 2, "ran")
    commands = {row["command"]: row for row in step["results"]["commands"]}
    assert commands["python -c pass"]["ratio"] == 1
    seconds = commands["quantmill plugins"]["seconds"]
    assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    seen = Page()
    seen.feed(page.read_text(encoding="utf-8"))
    assert (seen.open, seen.addresses) == ([], [])
    assert "quantmill plugins --json" in seen.text
    assert "its figures don't count" in seen.text
    assert "quantmill plugins --json" in done.stdout


def test_what_needs_an_absent_peer_is_said_not_to_run(tmp_path: Path) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    done = benchmarks(
        "quantize", "--only", "gguf_types.py", "--json", str(figures), "--page", str(page)
    )
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(figures.read_text(encoding="utf-8"))["steps"]
    assert step["status"] == "not run"
    assert "llama.cpp is absent (no --llama-cpp" in step["why"]
    assert step["why"] in done.stdout
    assert step["why"] in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("load", "--peer-python", sys.executable + "-none"), "has no GPTQModel"),
        (("load", "--llama-cpp", "nowhere"), "has no llama-bench"),
        (("load", "--only", "startup.py"), "startup.py not in load"),
        (("load", "--json", "nowhere/figures.json"), "no file in a folder that is there"),
        (("speed",), "invalid choice"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs(
    arguments: tuple[str, ...], words: str
) -> None:
    done = benchmarks(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "==" not in done.stderr
