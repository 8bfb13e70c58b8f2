"""``quantmill plan``."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from quantmill.cli.exits import PROBLEM
from quantmill.cli.options import JSON, memory_bytes, model_options
from quantmill.cli.output import print_json, show_findings, size, table


@click.command("plan")
@click.argument("source")
@click.argument("method", required=False)
@model_options
@click.option(
    "--memory",
    callback=memory_bytes,
    metavar="SIZE",
    help="Show every installed method that fits, e.g. 8GiB.",
)
@click.option("--context", default=2048, show_default=True, help="Tokens of key-value cache.")
@click.option("--all", "everything", is_flag=True, help="Every module, not one row per kind.")
@JSON
def command(
    source: str,
    method: str | None,
    memory: int | None,
    context: int,
    everything: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what METHOD would do to every module of SOURCE, without reading a weight."""
    import quantmill

    if memory is not None:
        candidates = quantmill.fits(
            source, memory, device=options["device"], dtype=options["dtype"], context=context
        )
        if as_json:
            print_json({"memory": memory, "candidates": [item.to_dict() for item in candidates]})
        else:
            rows = [
                (
                    item.name,
                    "yes" if item.fits else "no",
                    size(item.bytes),
                    size(item.peak),
                    f"{item.bits_per_weight:.2f}",
                    item.reason,
                )
                for item in candidates
            ]
            table(
                f"what fits into {size(memory)}",
                ("method", "fits", ">weights", ">peak", ">bits", "why"),
                rows,
            )
        sys.exit(0 if any(item.fits for item in candidates) else PROBLEM)
    plan = quantmill.plan(source, method, **options)
    if as_json:
        print_json(plan.to_dict())
    else:
        _show(plan, everything)
    sys.exit(PROBLEM if plan.findings.errors else 0)


def _show(plan: Any, everything: bool) -> None:
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for item in plan.modules:
        name = item.name if everything else re.sub(r"\.\d+(?=\.|$)", ".*", item.name)
        key = (name, item.action, item.method or "", item.form, item.shape, item.reason)
        row = rows.setdefault(key, [0, 0, 0])
        row[0] += 1
        row[1] += item.bytes_before
        row[2] += item.bytes_after
    table(
        f"plan of {plan.source}: {', '.join(plan.methods.values())}",
        ("module", ">count", "action", "form", "shape", ">before", ">after", "why"),
        [
            (name, count, action, form, "x".join(map(str, shape)), size(before), size(after), why)
            for (name, action, _, form, shape, why), (count, before, after) in rows.items()
        ],
    )
    totals = plan.totals
    click.echo(
        f"{totals['quantized']} quantized, {totals['kept']} kept. "
        f"{size(totals['bytes_before'])} -> {size(totals['bytes_after'])} on disk, "
        f"{size(totals['bytes_memory'])} in memory, {size(totals['peak_bytes'])} at the peak, "
        f"{totals['bits_per_weight']:.3f} bits per quantized weight."
    )
    show_findings(plan.findings)
