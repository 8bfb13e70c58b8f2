"""``quantmill plan``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from quantmill.cli.exits import OK, PROBLEM
from quantmill.cli.options import IMATRIX, JSON, memory_bytes, model_options, not_empty
from quantmill.cli.output import print_json, show_findings, size, spanned, starred, table

if TYPE_CHECKING:
    from quantmill.planning import ModulePlan, Plan


@click.command("plan")
@click.argument("source", callback=not_empty)
@click.argument("method", required=False, callback=not_empty)
@model_options
@click.option(
    "--memory",
    callback=memory_bytes,
    metavar="SIZE",
    help="Compare every installed method with this much memory, e.g. 8GiB.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of key-value cache, for --memory.",
)
@click.option(
    "--output",
    type=click.Path(),
    callback=not_empty,
    help="Plan how this folder or file would be written: a file's format may store what stays"
    " float in another dtype.",
)
@IMATRIX
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
) -> int:
    """Say what METHOD would do to every module of SOURCE, without reading a weight."""
    import quantmill

    if memory is not None:
        _refuse_with_memory(method, everything, options)
        return _compare(source, memory, context, options, as_json)
    plan = quantmill.plan(source, method, **options)
    if as_json:
        print_json(plan.to_dict())
    else:
        _show(plan, everything)
    return PROBLEM if plan.findings.errors else OK


def _refuse_with_memory(method: str | None, everything: bool, options: dict[str, Any]) -> None:
    """What a comparison of every method would silently ignore."""
    if method is not None:
        raise click.UsageError("--memory compares every installed method: leave METHOD out")
    names = ("skip", "include", "allow_unmatched", "strict", "output", "imatrix")
    ignored = [f"--{name.replace('_', '-')}" for name in names if options[name]]
    if everything:
        ignored.append("--all")
    if ignored:
        raise click.UsageError(f"{', '.join(ignored)} can't be used with --memory")


def _compare(source: str, memory: int, context: int, options: dict[str, Any], as_json: bool) -> int:
    import quantmill

    candidates = quantmill.fits(
        source, memory, device=options["device"], dtype=options["dtype"], context=context
    )
    if as_json:
        print_json({"memory": memory, "candidates": [item.to_dict() for item in candidates]})
    elif not candidates:
        click.echo("no method is installed: see `quantmill plugins`", err=True)
    else:
        table(
            f"what fits into {size(memory)}",
            ("method", "fits", ">weights", ">peak", ">bits", "why"),
            [
                (
                    item.name,
                    "yes" if item.fits else "no",
                    size(item.needs.weights if item.needs is not None else 0),
                    size(item.needs.peak if item.needs is not None else 0),
                    f"{item.bits_per_weight:.2f}",
                    item.reason,
                )
                for item in candidates
            ],
        )
    return OK if any(item.fits for item in candidates) else PROBLEM


def _show(plan: Plan, everything: bool) -> None:
    groups: dict[tuple[Any, ...], list[ModulePlan]] = {}
    for item in plan.modules:
        name = item.name if everything else starred(item.name)
        key = (name, item.action, item.method or "", item.form, item.shape, item.reason)
        groups.setdefault(key, []).append(item)
    alike = Counter(starred(item.name) for item in plan.modules)
    several = len(plan.methods) > 1
    table(
        f"plan of {plan.source}: {', '.join(plan.methods.values())}",
        (
            "module",
            ">count",
            "action",
            *(("method",) if several else ()),
            "form",
            "shape",
            ">before",
            ">after",
            "why",
        ),
        [
            (
                spanned([item.name for item in items], alike[name]),
                len(items),
                action,
                *((method,) if several else ()),
                form,
                "x".join(map(str, shape)),
                size(sum(item.bytes_before for item in items)),
                size(sum(item.bytes_after for item in items)),
                why,
            )
            for (name, action, method, form, shape, why), items in groups.items()
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
