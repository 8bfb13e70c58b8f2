"""The command line. Each command is a module here, imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from quantmill.cli.exits import INTERRUPTED, PROBLEM
from quantmill.findings import QuantmillError

__all__ = ["main"]

COMMANDS = {
    "doctor": "What this environment can do, and what is missing.",
    "eval": "Perplexity and KL divergence on a text.",
    "generate": "Continue a prompt.",
    "inspect": "What a checkpoint holds, from its headers.",
    "plan": "What would happen to every module, in exact bytes.",
    "plugins": "The installed plugins and their status.",
    "quantize": "Quantize a checkpoint into a new folder.",
    "schema": "JSON schema of a method's config.",
}
_MODULES = {"eval": "evaluate"}


class LazyGroup(click.Group):
    """Imports a command's module when the command runs, and not for ``--help``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"quantmill.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        import difflib

        if args and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantmill", prog_name="quantmill")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Plan, quantize, run and inspect language models.

    SOURCE is a folder, a safetensors file or a Hub id (org/name@revision). METHOD is a short name
    (bnb-nf4, with options bnb-nf4:bnb_4bit_blocksize=128), JSON text, or a JSON or YAML file.

    Exit codes: 0 fine, 1 errors among the findings, 2 wrong usage, 3 the environment lacks
    something (doctor --check, plugins --strict), 130 interrupted.
    """
    context.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        cli.main(args=given, prog_name="quantmill", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was left behind", err=True)
        sys.exit(INTERRUPTED)
    except QuantmillError as error:
        if debug:
            raise
        from quantmill.cli.output import show_error

        show_error(error, as_json="--json" in given)
        sys.exit(PROBLEM)
    sys.exit(0)
