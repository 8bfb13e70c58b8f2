"""Renew the texts of ``--help`` in docs/cli.md; a test says when they are out of date.

python tools/cli_help.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from quantmill.cli import COMMANDS, cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_BLOCK = re.compile(r"```text\nUsage: quantmill (\S+).*?\n```", re.DOTALL)
WIDTH = 78
"""What click makes of a terminal of 80 columns."""


def help_of(name: str | None) -> str:
    """The help of a command, or of all for None."""
    context = click.Context(
        cli, info_name="quantmill", terminal_width=WIDTH, **cli.context_settings
    )
    if name is not None:
        command = cli.get_command(context, name)
        if command is None:
            raise ValueError(f"there is no command {name!r}")
        context = click.Context(command, context, name, terminal_width=WIDTH)
    return "\n".join(line.rstrip() for line in context.get_help().splitlines())


def main() -> int:
    """Write the page; 1 if a command has no block in it."""
    text = PAGE.read_text(encoding="utf-8")
    seen = []

    def renew(match: re.Match[str]) -> str:
        name = match[1] if match[1] in COMMANDS else None
        seen.append(name)
        return f"```text\n{help_of(name)}\n```"

    PAGE.write_text(_BLOCK.sub(renew, text), encoding="utf-8")
    missing = sorted(set(COMMANDS) - set(seen))
    if missing:
        print(f"{PAGE.name} has no section with the help of: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
