"""Tables, JSON and progress bars. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from quantmill.findings import Finding, Severity

__all__ = ["print_json", "progress_bar", "show_findings", "size", "spanned", "starred", "table"]

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


def print_json(data: Any) -> None:
    """One JSON document on stdout. What JSON has no word for (infinity) is null."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(
        json.dumps(_plain(data), indent=2, ensure_ascii=not utf8, allow_nan=False, default=str)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def size(count: float) -> str:
    """Bytes for people: ``1.23 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def starred(name: str) -> str:
    """A module's name with its numbers as ``*``: one row for what repeats in every layer."""
    return _NUMBER.sub("*", name)


def spanned(names: Sequence[str], alike: int) -> str:
    """One name for several that differ in their numbers only, ``alike`` of which there are.

    All of them are ``layers.*``, some are ``layers.{0-1,7}``, one has its own name.
    """
    if len(names) == 1:
        return names[0]
    numbers = [_NUMBER.findall(name) for name in names]
    varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if len(names) == alike or len(varying) != 1:
        return starred(names[0])
    parts = iter(range(len(numbers[0])))
    ranges = _ranges(sorted(int(row[varying[0]]) for row in numbers))

    def put(match: re.Match[str]) -> str:
        return f"{{{ranges}}}" if next(parts) == varying[0] else match[0]

    return _NUMBER.sub(put, names[0])


def _ranges(numbers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in found)


def _visible(value: Any) -> str:
    # Names come from files of strangers: control characters must not reach the terminal.
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; columns whose name begins with ``>`` are right-aligned.

    In a terminal the widest columns wrap at spaces; piped output has one line a row.
    """
    right = [name.startswith(">") for name in columns]
    head = [name.removeprefix(">") for name in columns]
    cells = [[_visible(cell) for cell in row] for row in rows]
    by_column = list(zip(head, *cells, strict=True))
    widths = [max(map(len, column)) for column in by_column]
    if sys.stdout.isatty():
        words = [
            max(len(word) for cell in column for word in [*cell.split(), ""])
            for column in by_column
        ]
        _fit(
            widths,
            [width if r else word for r, width, word in zip(right, widths, words, strict=True)],
        )
    click.secho(_visible(title), bold=True)
    for line in _lines(head, widths, right):
        click.secho(line, bold=True)
    click.echo("  ".join("-" * width for width in widths))
    for row in cells:
        for line in _lines(row, widths, right):
            click.echo(line)
    click.echo()


def _fit(widths: list[int], least: Sequence[int]) -> None:
    """Narrow the widest columns to the terminal's width, never below their longest word."""
    import shutil

    room = shutil.get_terminal_size().columns - 2 * (len(widths) - 1)
    while sum(widths) > room:
        slack = [width - low for width, low in zip(widths, least, strict=True)]
        if max(slack) <= 0:
            return
        widths[max(range(len(widths)), key=lambda i: (slack[i] > 0, widths[i]))] -= 1


def _lines(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterator[str]:
    if all(len(cell) <= width for cell, width in zip(row, widths, strict=True)):
        wrapped = [[cell] for cell in row]
    else:
        import textwrap

        wrapped = [
            textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
            for cell, width in zip(row, widths, strict=True)
        ]
    for index in range(max(map(len, wrapped), default=0)):
        parts = [lines[index] if index < len(lines) else "" for lines in wrapped]
        yield "  ".join(
            part.rjust(width) if to_right else part.ljust(width)
            for part, width, to_right in zip(parts, widths, right, strict=True)
        ).rstrip()


def show_findings(findings: Iterable[Finding], *, err: bool = True) -> None:
    """Every finding with its cause and fix."""
    for item in findings:
        head = click.style(f"{item.severity.value} {item.code}", fg=_COLOURS[item.severity])
        click.echo(f"{head} {_visible(item.where)}", err=err)
        for line in item.cause.splitlines():
            click.echo(f"  {_visible(line)}", err=err)
        if item.fix:
            click.echo(f"  fix: {_visible(item.fix)}", err=err)


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr as a progress callback; None when ``quiet`` or when nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None, at="")

        def advance(done: int, total: int, at: str) -> None:
            bar.update(task, completed=done, total=total, at=_visible(at))

        yield advance
