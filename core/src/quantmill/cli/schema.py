"""``quantmill schema``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantmill.cli.options import JSON, not_empty
from quantmill.cli.output import print_json


@click.command("schema")
@click.argument("method", callback=not_empty)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it there.")
@JSON
def command(method: str, out: Path | None, as_json: bool) -> None:
    """Print the JSON schema of METHOD's config. METHOD is a name here, not a config."""
    import quantmill

    if method.lstrip().startswith("{") or method.endswith((".json", ".yaml", ".yml")):
        raise click.UsageError("METHOD is the name of a method here, for example bnb-nf4")
    schema = quantmill.method_schema(method)
    if out is None:
        print_json(schema)
        return
    out.write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if as_json:
        print_json({"written": str(out)})
    else:
        click.echo(f"wrote {out}")
