"""``quantmill inspect``."""

from __future__ import annotations

import click

from quantmill.cli.options import JSON
from quantmill.cli.output import print_json, show_findings, size, table


@click.command("inspect")
@click.argument("source")
@click.option("--tensors", is_flag=True, help="Every tensor.")
@JSON
def command(source: str, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    import quantmill

    found = quantmill.inspect(source)
    if as_json:
        print_json(found.to_dict())
        return
    if found.quantization:
        rows = sorted((key, value) for key, value in found.quantization.items())
        table("quantization_config", ("key", "value"), rows)
    if found.modules:
        table(
            "modules",
            ("name", "method", "form", "shape", ">bytes"),
            [
                (
                    item["name"],
                    item["method"] or "",
                    item["form"],
                    "x".join(map(str, item["shape"])),
                    size(item["bytes"]),
                )
                for item in found.modules
                if item["method"] or tensors
            ],
        )
    if tensors or not found.modules:
        table(
            "tensors",
            ("name", "dtype", "shape", ">bytes", "file"),
            [
                (
                    item["name"],
                    item["dtype"],
                    "x".join(map(str, item["shape"])),
                    size(item["bytes"]),
                    item["file"],
                )
                for item in found.tensors
            ],
        )
    kinds = ", ".join(f"{k} {size(v)}" for k, v in found.totals["bytes_by_dtype"].items())
    click.echo(f"{found.totals['tensors']} tensors, {size(found.totals['bytes'])}: {kinds}")
    show_findings(found.findings)
