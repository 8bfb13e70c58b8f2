"""Figures of any script as grids of text: for the terminal, and as a page that needs no network."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BYTES = ("peak", "model", "beyond_model", "anonymous", "peak_forward", "weights", "above")
"""Columns of bytes, shown in MiB."""
SPREAD = {"median", "least", "most"}


def merged(documents: Sequence[Any]) -> Any:
    """The documents of several runs as one: numbers that differ become median, least and most."""
    first = documents[0]
    if all(isinstance(one, dict) for one in documents):
        keys = [key for key in first if all(key in one for one in documents)]
        return {key: merged([one[key] for one in documents]) for key in keys}
    if all(isinstance(one, list) and len(one) == len(first) for one in documents):
        return [merged(items) for items in zip(*documents, strict=True)]
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in documents):
        if all(one == first for one in documents):
            return first
        return {
            "median": statistics.median(documents),
            "least": min(documents),
            "most": max(documents),
        }
    return first


@dataclass(frozen=True)
class Grid:
    """Rows of one shape."""

    title: str
    rows: list[dict[str, Any]]

    @property
    def columns(self) -> list[str]:
        """Names in the order they first come."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def _flat(item: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in item.items():
        if isinstance(value, dict) and set(value) != SPREAD:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _named(value: Any) -> bool:
    """Whether it is rows by their names."""
    rows = list(value.values()) if isinstance(value, dict) else []
    return (
        bool(rows)
        and all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
        and set(rows[0]) != SPREAD
    )


def grids(document: Any) -> list[Grid]:
    """A script's document: one grid for what it says once, one for each list of rows."""
    if _rows(document):
        return [Grid("", [_flat(row) for row in document])]
    if not isinstance(document, dict):
        return [Grid("", [{"value": document}])]
    document = {
        key: [{"of": name, **row} for name, row in value.items()] if _named(value) else value
        for key, value in document.items()
    }
    once = {key: value for key, value in document.items() if not _rows(value)}
    lists = [
        Grid(key, [_flat(row) for row in value]) for key, value in document.items() if _rows(value)
    ]
    head = [{"what": key, "value": value} for key, value in _flat(once).items() if value != []]
    return [*([Grid("", head)] if head else []), *lists]


def shown(value: Any, column: str) -> str:
    """A cell's text."""
    if value is None:
        return "-"
    if isinstance(value, dict) and set(value) == SPREAD:
        median, least, most = (shown(value[key], column) for key in ("median", "least", "most"))
        return f"{median} [{least}, {most}]"
    if isinstance(value, list):
        return "[" + ", ".join(shown(one, column) for one in value) + "]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if column.rpartition(".")[2] in BYTES:
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def text(grid: Grid) -> str:
    """For a terminal."""
    columns = grid.columns
    cells = [[shown(row.get(name), _unit(row, name)) for name in columns] for row in grid.rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, ["-" * width for width in widths], *cells]
    ]
    return "\n".join([*([f"{grid.title}:"] if grid.title else []), *lines])


def _unit(row: Mapping[str, Any], column: str) -> str:
    """The name that tells a cell's unit: of a value said once, that of what it is."""
    return str(row["what"]) if column == "value" and "what" in row else column


STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #d9dee7;
  --paper: #fff; --good: #bfe6cd; --bad: #f6d9b4; --note: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #333b48;
  --paper: #161a21; --good: #1f5a38; --bad: #6b4a17; --note: #3d3416; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .3rem 0 .8rem; max-width: 60rem; } .soft, h3, code.run { color: var(--soft); }
h3 { font-size: .9rem; margin: 1rem 0 .2rem; }
.note { background: var(--note); padding: .5rem .8rem; border-radius: 6px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; } th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; font-size: .8rem; }
"""


def _middle(value: Any) -> float | None:
    if isinstance(value, dict) and set(value) == SPREAD:
        value = value["median"]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cell(row: Mapping[str, Any], name: str, better: str | None, most: float) -> str:
    value = row.get(name)
    words = html.escape(shown(value, _unit(row, name)))
    number = _middle(value)
    if number is None:
        return f"<td>{words}</td>"
    style = ""
    if better and most > 0:
        good = number <= 1 if better == "lower" else number >= 1
        share = 100 * max(0.0, min(1.0, number / most))
        color = "var(--good)" if good else "var(--bad)"
        style = (
            f' style="background:linear-gradient(to right,{color} {share:.1f}%,'
            f'transparent {share:.1f}%)"'
        )
    return f'<td class="number"{style}>{words}</td>'


def markup(grid: Grid, ratios: Mapping[str, str]) -> str:
    """A table; ratios carry a bar, coloured by the side of 1 that they are on."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in grid.columns)
    most = {
        name: max([number for row in grid.rows if (number := _middle(row.get(name)))], default=0.0)
        for name in grid.columns
    }
    body = "".join(
        "<tr>"
        + "".join(_cell(row, name, ratios.get(name), most[name]) for name in grid.columns)
        + "</tr>\n"
        for row in grid.rows
    )
    title = f"<h3>{html.escape(grid.title)}</h3>" if grid.title else ""
    return f'{title}<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def page(document: Mapping[str, Any]) -> str:
    """The whole run as HTML."""
    machine, peers = document["machine"], document["peers"]
    parts = [
        f"<h1>quantmill: {html.escape(document['table'])}</h1>",
        f'<p class="soft">{html.escape(document["date"])}, '
        f"{html.escape(', '.join(f'{key} {value}' for key, value in machine.items()))}</p>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in document["notes"]),
        markup(
            Grid(
                "Peers",
                [
                    {"peer": name, "version": found.get("version") or f"absent, {found['absent']}"}
                    for name, found in peers.items()
                ],
            ),
            {},
        )
        if peers
        else "",
    ]
    for step in document["steps"]:
        given = [one if " " not in one else f'"{one}"' for one in step["arguments"]]
        run = html.escape(" ".join(["python", f"benchmarks/{step['script']}", *given]))
        reading = re.sub("`(.*?)`", r"<code>\1</code>", html.escape(step["reading"]))
        parts += [
            f"<h2>{html.escape(step['title'])}</h2>",
            f"<p>{reading}</p>",
            f'<p><code class="run">{run}</code></p>',
        ]
        if step["status"] != "ran":
            words = html.escape(f"{step['status']}: {step['why']}")
            parts.append(f'<pre class="note">{words}</pre>')
            continue
        if step["absent"]:
            parts.append(
                f'<p class="note">Absent here: {html.escape(", ".join(step["absent"]))}</p>'
            )
        parts += [markup(grid, step["ratios"]) for grid in grids(step["results"])]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>quantmill: {html.escape(document['table'])}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )
