"""``quantmill verify``."""

from __future__ import annotations

import click

from quantmill.cli.exits import OK, PROBLEM
from quantmill.cli.options import JSON, QUIET, not_empty
from quantmill.cli.output import print_json, progress_bar, show_findings, size, table


@click.command("verify")
@click.argument("source", callback=not_empty)
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@QUIET
@JSON
def command(source: str, strict: bool, quiet: bool, as_json: bool) -> int:
    """Look at every tensor of SOURCE and say whether it is sound; exit code 1 if not.

    Checked are shapes and dtypes, SHA-256 of the files, codes, scales, zero points and group
    index of quantized weights, NaN, tied weights, and that the config describes the tensors.
    """
    import quantmill
    from quantmill.verification.run import CHECKS

    with progress_bar("verifying", quiet=quiet) as progress:
        found = quantmill.verify(source, progress=progress)
    failed = not found.sound or (strict and bool(found.findings.warnings))
    if as_json:
        print_json(found.to_dict())
        return PROBLEM if failed else OK
    table(
        f"{found.source}, {size(found.bytes)}",
        ("check", ">looked at", ">findings", "what"),
        [
            (name, found.checked[name], found.failed[name] or "", words)
            for name, words in CHECKS.items()
        ],
    )
    show_findings(found.findings)
    click.echo("not sound" if failed else f"sound: verified in {found.seconds:.1f} s")
    return PROBLEM if failed else OK
