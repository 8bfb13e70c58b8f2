"""``quantmill inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from quantmill.cli.exits import OK, PROBLEM
from quantmill.cli.options import JSON, not_empty
from quantmill.cli.output import print_json, show_findings, size, spanned, starred, table


@click.command("inspect")
@click.argument("source", callback=not_empty)
@click.option("--tensors", is_flag=True, help="Every module and tensor, not one row per kind.")
@JSON
def command(source: str, tensors: bool, as_json: bool) -> int:
    """Show what a checkpoint holds, from its headers alone."""
    import quantmill

    found = quantmill.inspect(source)
    code = PROBLEM if found.findings.errors else OK
    if as_json:
        print_json(found.to_dict())
        return code
    if found.quantization:
        rows = sorted((key, value) for key, value in found.quantization.items())
        table("quantization_config", ("key", "value"), rows)
    elif found.kind != "safetensors":
        table("metadata", ("key", "value"), sorted(found.metadata.items()))
    if found.modules:
        shown = [item for item in found.modules if item["method"] or tensors]
        table(
            "modules",
            ("name", ">count", "method", "form", "shape", ">bytes"),
            _rows(shown, ("method", "form", "shape"), tensors),
        )
    if tensors or not found.modules:
        table(
            "tensors",
            ("name", ">count", "dtype", "shape", ">bytes"),
            _rows(found.tensors, ("dtype", "shape"), tensors),
        )
    kinds = ", ".join(f"{k} {size(v)}" for k, v in found.totals["bytes_by_dtype"].items())
    files = found.totals["files"]
    click.echo(
        f"{found.totals['tensors']} tensors in {files} file{'' if files == 1 else 's'},"
        f" {size(found.totals['bytes'])}: {kinds}"
    )
    show_findings(found.findings)
    return code


def _rows(
    items: Sequence[dict[str, Any]], keys: Sequence[str], everything: bool
) -> list[tuple[Any, ...]]:
    """Names that differ in their numbers only and have equal facts are one row."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in items:
        name = item["name"] if everything else starred(item["name"])
        facts = ("x".join(map(str, item[k])) if k == "shape" else item[k] or "" for k in keys)
        groups.setdefault((name, *facts), []).append(item)
    alike = Counter(starred(item["name"]) for item in items)
    return [
        (
            spanned([item["name"] for item in same], alike[name]),
            len(same),
            *facts,
            size(sum(item["bytes"] for item in same)),
        )
        for (name, *facts), same in groups.items()
    ]
