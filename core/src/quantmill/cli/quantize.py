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
from quantmill.cli.output import print_json, progress_bar, show_findings, size


@click.command("quantize")
@click.argument("source", callback=not_empty)
@click.argument("output", type=click.Path(), callback=not_empty)
@click.argument("method", callback=not_empty)
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
@calibration_options
@QUIET
@JSON
def command(
    source: str,
    output: str,
    method: str,
    max_shard: int | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize SOURCE with METHOD into the new folder or file OUTPUT, streaming.

    An OUTPUT that ends like a file of a known format (.gguf) is written as such.
    """
    import quantmill
    from quantmill.processes import first_process

    options |= calibration_arguments(options)
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
