"""``quantmill choose``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantmill.cli.exits import OK, PROBLEM
from quantmill.cli.options import (
    DEVICE,
    DTYPES,
    JSON,
    QUIET,
    calibration_file,
    memory_bytes,
    not_empty,
)
from quantmill.cli.output import print_json, progress_bar, show_findings, size, table

if TYPE_CHECKING:
    from quantmill.choosing import Choice, Measured


@click.command("choose")
@click.argument("model", callback=not_empty)
@click.option(
    "--memory",
    callback=memory_bytes,
    metavar="SIZE",
    required=True,
    help="Memory for weights, cache and work, e.g. 6GiB.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to measure on: KL divergence from the float model.",
)
@click.option(
    "--for",
    "use",
    type=click.Choice(["infer", "train"]),
    default="infer",
    show_default=True,
    help="Continue texts, or train adapters on the frozen model.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of the key-value cache, or of a training sequence.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Of the adapters, for --for train.",
)
@click.option("--methods", metavar="NAMES", help="Only these, separated by commas.")
@click.option(
    "--measure",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="How many of those that fit to run on the text, least loss first.",
)
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Score only the first windows of the text.",
)
@calibration_file
@click.option("--dtype", type=click.Choice(DTYPES), help="Of activations and unquantized weights.")
@DEVICE
@QUIET
@JSON
def command(
    model: str,
    memory: int,
    methods: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Which method MODEL fits with into a memory, and which of them costs least quality.

    Sizes come from headers alone. With --text the candidates that fit are run against the float
    model, block by block: neither of them has to fit into memory for that.
    """
    import quantmill

    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    with progress_bar("choosing", quiet=quiet) as progress:
        found = quantmill.choose(model, memory, methods=names, progress=progress, **options)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    return OK if found.best is not None else PROBLEM


def _show(found: Choice) -> None:
    measured = any(item.kl is not None for item in found.candidates)
    training = found.use == "train"
    table(
        f"{found.source} in {size(found.memory)} to {found.use}, {found.context} tokens",
        (
            "method",
            "fits",
            *((">KL", ">same top", ">perplexity") if measured else ()),
            ">bits",
            ">disk",
            ">weights",
            ">adapters" if training else ">cache",
            ">work",
            ">peak",
            "why",
        ),
        [_row(item, measured, training) for item in found.candidates],
    )
    show_findings(found.findings)
    best = found.best
    if best is None:
        click.echo("nothing fits", err=True)
        return
    words = f"take {best.candidate.name}"
    if best.kl is not None:
        words += f": KL {best.kl:.4f} nats per token on {found.tokens:,} tokens of {found.text}"
    elif not measured:
        words += ": it gives up least bits (not measured: give --text)"
    click.echo(words)


def _row(item: Measured, measured: bool, training: bool) -> tuple[Any, ...]:
    candidate, needs = item.candidate, item.candidate.needs
    scores: tuple[str, ...] = ()
    if measured:
        scores = ("", "", "")
        if item.kl is not None:
            scores = (f"{item.kl:.4f}", f"{item.top1_agreement:.1%}", f"{item.perplexity:.3f}")
    sizes = ("", "", "", "")
    if needs is not None:
        own = needs.adapters if training else needs.cache
        sizes = (size(needs.weights), size(own), size(needs.working), size(needs.peak))
    why = candidate.reason
    if candidate.finding is not None:
        why = f"{candidate.finding.code} {why}"
    elif item.finding is not None:
        why = f"not measured: {item.finding.code} {item.finding.cause}"
    return (
        candidate.name,
        "yes" if candidate.fits else "no",
        *scores,
        f"{candidate.bits_per_weight:.2f}" if needs is not None else "",
        size(candidate.bytes) if needs is not None else "",
        *sizes,
        why,
    )
