"""``quantmill new-plugin``."""

from __future__ import annotations

from pathlib import Path

import click

from quantmill.cli.options import JSON, not_empty
from quantmill.cli.output import print_json


@click.command("new-plugin")
@click.argument("name", callback=not_empty)
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="the current folder",
    help="Make the package's folder in this one.",
)
@JSON
def command(name: str, into: Path, as_json: bool) -> None:
    """Make a package with a working quantization method, to be turned into yours.

    NAME is that of the method: small letters, digits and single hyphens. The package
    quantmill-NAME installs and passes its tests as it is.
    """
    from quantmill.scaffold import new_plugin

    made = new_plugin(name, into)
    if as_json:
        print_json(
            {
                "name": made.name,
                "folder": str(made.folder),
                "files": list(made.files),
                "next": list(made.next),
            }
        )
        return
    click.echo(f"made {made.folder} with {len(made.files)} files. Next:")
    for line in (f"cd {made.folder}", *made.next):
        click.echo(f"  {line}")
