"""``quantmill schema``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantmill.cli.options import JSON
from quantmill.cli.output import print_json


@click.command("schema")
@click.argument("method")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it there.")
@JSON
def command(method: str, out: Path | None, as_json: bool) -> None:
    """Print the JSON schema of METHOD's config."""
    import quantmill

    schema = quantmill.method_schema(method)
    if out is None:
        print_json(schema)
        return
    out.write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if as_json:
        print_json({"written": str(out)})
    else:
        click.echo(f"wrote {out}")
