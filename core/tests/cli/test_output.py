"""Tables, JSON and findings as they reach a terminal, a pipe or a program."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from quantmill.cli.output import (
    print_json,
    progress_bar,
    show_findings,
    size,
    spanned,
    starred,
    table,
)
from quantmill.findings import Finding, Severity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal(columns: int = 40) -> Iterator[io.StringIO]:
    """A terminal as stdout. Inside the test: pytest's capture replaces stdout after fixtures."""
    stream = Terminal()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stream):
        patch.setenv("COLUMNS", str(columns))
        yield stream


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 1024, "1.50 MiB"),
        (810 * 10**9, "754.37 GiB"),
        (2**50, "1024.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.12.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("h.0", "h.*"),
        ("a.1.b.2.weight", "a.*.b.*.weight"),
        ("layer1.conv2", "layer1.conv2"),
        ("lm_head", "lm_head"),
    ],
)
def test_starred(name: str, short: str) -> None:
    assert starred(name) == short


@pytest.mark.parametrize(
    ("names", "alike", "short"),
    [
        (["layers.3.up"], 8, "layers.3.up"),
        (["layers.0.up", "layers.1.up"], 2, "layers.*.up"),
        (["layers.0.up", "layers.1.up", "layers.7.up"], 8, "layers.{0-1,7}.up"),
        (["layers.9.up", "layers.10.up"], 11, "layers.{9-10}.up"),
        (["a.2.b.0", "a.2.b.5"], 9, "a.2.b.{0,5}"),
        (["a.0.b.1", "a.1.b.0"], 9, "a.*.b.*"),
    ],
)
def test_spanned(names: list[str], alike: int, short: str) -> None:
    assert spanned(names, alike) == short


def test_a_piped_table_has_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 60 + "end"
    table("title", ("name", ">bytes", "why"), [("a", 5, "x"), ("bcd", 1234, long)])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "name  bytes  why",
        f"----  -----  {'-' * len(long)}",
        "a         5  x",
        f"bcd    1234  {long}",
        "",
    ]


def test_an_empty_table_has_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    table("title", ("name", ">n"), [])
    assert capsys.readouterr().out.splitlines() == ["title", "name  n", "----  -", ""]


def test_a_terminal_s_table_wraps_at_spaces() -> None:
    with terminal() as stream:
        table("t", ("name", ">bytes", "why"), [("model.layers.0.mlp", "1.5 MiB", "one two " * 6)])
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 40 + len("\x1b[1m\x1b[0m")
    assert sum("one" in line or "two" in line for line in lines) > 1
    assert any(line.startswith("model.layers.0.mlp") and "1.5 MiB" in line for line in lines)


def test_a_terminal_s_table_never_cuts_a_word() -> None:
    name = "x" * 60
    with terminal() as stream:
        table("t", ("name", "why"), [(name, "some long words to wrap here and there")])
    assert name in stream.getvalue()


def test_control_characters_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with terminal() as stream:
        table("t\x1b[2J", ("name",), [("evil\x1b]0;owned\x07name",)])
    shown = stream.getvalue()
    assert "\x1b]" not in shown and "\x1b[2J" not in shown and "\x07" not in shown
    assert r"evil\x1b]0;owned\x07name" in shown
    show_findings([Finding("QM-A-001", Severity.ERROR, "a\x1bb", "c\rd", "e\x07", {})])
    assert not {"\x1b", "\r", "\x07"} & set(capsys.readouterr().err)


def test_json_of_what_json_has_no_word_for(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.inf, "b": [math.nan, 1.5, (2,)], 3: {"c": -math.inf}, "d": os})
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["a"] is None and data["b"] == [None, 1.5, [2]] and data["3"] == {"c": None}
    assert isinstance(data["d"], str)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    data = {"text": "naïve “quotes” 漢字 \ud800"}
    print_json(data)
    stream.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == data


def test_findings_say_cause_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    items: list[Any] = [
        Finding("QM-A-001", Severity.WARNING, "here", "because", "do this", {}),
        Finding("QM-A-002", Severity.INFO, "", "well", "", {}),
    ]
    show_findings(items)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err == "warning QM-A-001 here\n  because\n  fix: do this\ninfo QM-A-002 \n  well\n"
    )


def test_no_progress_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work", quiet=False) as tick:
        assert tick is None
    assert capsys.readouterr().err == ""


def test_progress_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("work", quiet=True) as tick:
        assert tick is None
    with progress_bar("work", quiet=False) as tick:
        assert tick is not None
        tick(1, 2, "a.name[/with]brackets")  # markup would be an error here
    assert "work" in stream.getvalue()
