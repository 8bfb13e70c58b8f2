"""``quantmill quantize``."""

from __future__ import annotations

from typing import Any

import click

from quantmill.cli.options import (
    IMATRIX,
    JSON,
    QUIET,
    calibration_arguments,
    calibration_options,
    memory_bytes,
    model_options,
    not_empty,
)
from quantmill.cli.output import print_json, progress_bar, show_findings, size, table


@click.command("quantize")
@click.argument("source", callback=not_empty)
@click.argument("output", type=click.Path(), callback=not_empty)
@click.argument("method", required=False, callback=not_empty)
@model_options
@click.option(
    "--non-finite",
    type=click.Choice(["error", "keep"]),
    default="error",
    show_default=True,
    help="NaN or infinity in a weight: stop, or keep it float.",
)
@click.option(
    "--max-shard",
    callback=memory_bytes,
    metavar="SIZE",
    help="Most bytes of tensors in one file. [default: 5GB in a folder, no limit in a file]",
)
@IMATRIX
@click.option(
    "--budget",
    callback=not_empty,
    metavar="BITS",
    help="Bits per weight of the targets, e.g. 4.25bpw: each gets one of --methods.",
)
@click.option(
    "--methods",
    callback=not_empty,
    metavar="NAMES",
    help="Methods to choose from for --budget, separated by commas; with options, by semicolons.",
)
@calibration_options
@QUIET
@JSON
def command(
    source: str,
    output: str,
    method: str | None,
    max_shard: int | None,
    budget: str | None,
    methods: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize SOURCE with METHOD into the new folder or file OUTPUT, streaming.

    An OUTPUT that ends like a file of a known format (.gguf) is written as such. With --budget in
    place of METHOD, every target gets that of --methods which costs the model least, within so
    many bits per weight in all; --calibration is what that is measured on.
    """
    import quantmill
    from quantmill.processes import first_process

    options |= calibration_arguments(options)
    if method is None and budget is None and methods is None:
        raise click.UsageError("Missing argument 'METHOD', or --budget with --methods.")
    if method is not None and (budget is not None or methods is not None):
        raise click.UsageError("--budget chooses from --methods: leave METHOD out")
    if (budget is None) != (methods is None):
        raise click.UsageError("--budget and --methods belong together")
    if budget is not None and methods is not None:
        _within_budget(source, output, budget, methods, max_shard, quiet, as_json, options)
        return
    shown = first_process()
    with progress_bar("quantizing", quiet=quiet or not shown) as progress:
        report = quantmill.quantize(
            source, output, method, progress=progress, max_shard_bytes=max_shard, **options
        )
    if not shown:
        return
    if as_json:
        print_json(report.to_dict())
        return
    show_findings(report.plan.findings)
    totals = report.plan.totals
    click.echo(
        f"wrote {size(report.bytes)} to {report.folder} in {report.seconds:.1f} s: "
        f"{totals['quantized']} modules quantized, {totals['bits_per_weight']:.3f} bits per weight"
    )


def _within_budget(
    source: str,
    output: str,
    budget: str,
    methods: str,
    max_shard: int | None,
    quiet: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    import quantmill

    # Options of methods are separated by commas themselves.
    names = [
        name.strip() for name in methods.split(";" if ";" in methods or ":" in methods else ",")
    ]
    with progress_bar("searching", quiet=quiet) as progress:
        report = quantmill.quantize_to_budget(
            source,
            output,
            budget,
            [name for name in names if name],
            progress=progress,
            max_shard_bytes=max_shard,
            **options,
        )
    if as_json:
        print_json(report.to_dict())
        return
    show_findings(report.findings)
    counts = report.counts
    table(
        f"{len(report.chosen)} targets of {source} in {report.budget:g} bits per weight",
        ("method", ">targets", ">bits alone", ">KL alone (estimated)"),
        [
            (label, counts.get(label, 0), f"{bits:.3f}", f"{cost:.4f}")
            for label, (bits, cost) in report.uniform.items()
        ],
    )
    click.echo(
        f"the mixture: {report.bits:.4f} bits per weight, estimated KL {report.estimated:.4f} nats"
        " per token"
    )
    if report.correlation is not None:
        click.echo(
            f"estimate and measurement of {len(report.measured)} pairs: correlation"
            f" {report.correlation:.3f} of logarithms"
        )
    assert report.written is not None
    seconds = sum(report.seconds.values())
    search = seconds - report.seconds["the mixture"]
    click.echo(
        f"wrote {size(report.written.bytes)} to {report.written.folder} in {seconds:.1f} s,"
        f" {search:.1f} s of them for the search"
    )
