"""``quantmill imatrix``."""

from __future__ import annotations

from typing import Any

import click

from quantmill.cli.options import (
    DEVICE,
    DTYPES,
    JSON,
    QUIET,
    calibration_arguments,
    calibration_options,
    not_empty,
)
from quantmill.cli.output import print_json, progress_bar, show_findings


@click.command("imatrix")
@click.argument("source", callback=not_empty)
@click.argument("output", type=click.Path(), callback=not_empty)
@DEVICE
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype to compute in.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Do not measure these.")
@click.option("--head", is_flag=True, help="Measure the output head too.")
@calibration_options
@QUIET
@JSON
def command(source: str, output: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Run the float model SOURCE on a text and write an importance matrix to the file OUTPUT.

    It holds how large the inputs of each column are, for quantize --imatrix. OUTPUT ends in .gguf,
    or in .dat for llama.cpp's older format. --calibration names the text.
    """
    import quantmill

    options |= calibration_arguments(options)
    with progress_bar("measuring", quiet=quiet) as progress:
        report = quantmill.imatrix(source, output, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
        return
    show_findings(report.findings)
    click.echo(
        f"wrote {report.path} in {report.seconds:.1f} s: {report.modules} modules measured on"
        f" {report.tokens:,} tokens"
    )
