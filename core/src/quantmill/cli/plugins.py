"""``quantmill plugins``."""

from __future__ import annotations

import click

from quantmill.cli.exits import ENVIRONMENT, OK
from quantmill.cli.options import JSON
from quantmill.cli.output import print_json, table
from quantmill.host import Status, default_host


@click.command("plugins")
@JSON
@click.option("--strict", is_flag=True, help="Exit with 3 if any plugin is not ok.")
def command(as_json: bool, strict: bool) -> int:
    """List the installed plugins: what they provide, and why one can't be used."""
    host = default_host()
    plugins = list(host.plugins.values())
    if as_json:
        print_json({"plugins": [item.to_dict() for item in plugins]})
    elif not plugins:
        click.echo('no plugin is installed; for example: pip install "quantmill[bnb]"')
    else:
        rows = [
            (
                item.name,
                f"{item.distribution} {item.version}",
                item.status.value,
                "; ".join(
                    f"{kind}: {', '.join(names)}" for kind, names in item.provides.items() if names
                ),
                f"{item.reason}. {item.fix}" if item.reason else "",
            )
            for item in plugins
        ]
        table("plugins", ("name", "distribution", "status", "provides", "reason"), rows)
    bad = [item for item in plugins if item.status not in (Status.OK, Status.DISABLED)]
    return ENVIRONMENT if strict and bad else OK
