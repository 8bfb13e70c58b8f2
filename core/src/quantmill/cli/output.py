"""Tables, JSON and progress bars. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from quantmill.findings import Finding, QuantmillError, Severity

__all__ = ["print_json", "progress_bar", "show_error", "show_findings", "size", "table"]

_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def size(count: float) -> str:
    """Bytes for people: ``1.23 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; columns whose name begins with ``>`` are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    console = Console()
    # Piped output has no width of its own: let nothing be cut there.
    Console(width=None if console.is_terminal else 160).print(made)


def show_findings(findings: Sequence[Finding] | Any, *, err: bool = True) -> None:
    """Every finding with its cause and fix."""
    for item in findings:
        head = click.style(f"{item.severity.value} {item.code}", fg=_COLOURS[item.severity])
        click.echo(f"{head} {item.where}", err=err)
        click.echo(f"  {item.cause}", err=err)
        if item.fix:
            click.echo(f"  fix: {item.fix}", err=err)


def show_error(error: QuantmillError, *, as_json: bool) -> None:
    """All findings of an error, no traceback."""
    if as_json:
        print_json({"error": True, "findings": [item.to_dict() for item in error.findings]})
    else:
        show_findings(error.findings)


@contextmanager
def progress_bar(
    what: str, *, quiet: bool, unit: str = "bytes"
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr as a progress callback; None when ``quiet``."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None, at="")

        def advance(done: int, total: int, at: str) -> None:
            bar.update(task, completed=done, total=total, at=at)

        yield advance
