"""The command line. Each command is a module here, imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from quantmill import __version__
from quantmill.cli.exits import INTERRUPTED, OK, PROBLEM, USAGE
from quantmill.findings import QuantmillError
from quantmill.importing import without_collector

__all__ = ["main"]

COMMANDS = {
    "choose": "Which method fits into a memory, and which costs least, measured.",
    "compare": "Two checkpoints of one model, by weights and by what they compute.",
    "convert": "Convert a checkpoint to another format, without loss where one exists.",
    "doctor": "What this environment can do, and what is missing.",
    "eval": "Perplexity and KL divergence on a text.",
    "generate": "Continue a prompt.",
    "imatrix": "Measure an importance matrix on a text.",
    "inspect": "What a checkpoint holds, from its headers.",
    "kernels": "The kernels, and which one a module would use.",
    "new-plugin": "A package with a working quantization method, to be turned into yours.",
    "plan": "What would happen to every module, in exact bytes.",
    "plugins": "The installed plugins and their status.",
    "quantize": "Quantize a checkpoint into a new folder.",
    "schema": "JSON schema of a method's config.",
    "verify": "Whether a checkpoint is sound: every tensor, code and scale, and checksums.",
}
_MODULES = {"eval": "evaluate", "new-plugin": "new_plugin"}


class _ReaderLeft(Exception):
    """Stdout was closed by whoever read it; click would make an error of it."""


class LazyGroup(click.Group):
    """Imports a command's module when the command runs, and not for ``--help``."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except BrokenPipeError as error:
            raise _ReaderLeft from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderLeft from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        with without_collector():
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


@click.group(
    cls=LazyGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="quantmill")
@click.option("--debug", is_flag=True, help="Show tracebacks and what libraries log.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Plan, quantize, run and inspect language models.

    SOURCE is a folder, a file or a Hub id (org/name@revision). METHOD is a short name (bnb-nf4,
    with options bnb-nf4:bnb_4bit_blocksize=128), JSON text, or a JSON or YAML file.

    Results go to stdout, findings and progress to stderr. With --json, stdout is one JSON
    document, for errors too.

    Exit codes: 0 fine, 1 errors among the findings or nothing that fits, 2 wrong usage, 3 the
    environment lacks something (doctor --check, plugins --strict), 130 interrupted.
    """
    import logging

    if debug:
        context.obj["debug"] = True
    else:
        # Findings say what matters; a peer's hints would stand between them.
        logging.disable(logging.WARNING)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _environment():
        code = _run(given)
    sys.exit(code)


def _run(given: list[str]) -> int:
    state = {"debug": False}
    as_json = "--json" in (given[: given.index("--")] if "--" in given else given)
    try:
        if not given:
            context = click.Context(cli, info_name="quantmill", **cli.context_settings)
            click.echo(cli.get_help(context), err=True)
            return USAGE
        code = cli.main(args=given, prog_name="quantmill", standalone_mode=False, obj=state)
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except (_ReaderLeft, BrokenPipeError):
        # The reader has seen enough (| head). What is left in the buffer must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK
    except (KeyboardInterrupt, click.Abort):
        from quantmill.cli.errors import INTERRUPTED_RUN, report

        where = given[0] if given else "quantmill"
        finding = INTERRUPTED_RUN(where, "interrupted", "run the same command again")
        return report([finding], INTERRUPTED, as_json=as_json)
    except click.ClickException as error:
        if not as_json:
            error.show()
            return error.exit_code
        from quantmill.cli.errors import report, usage_finding

        return report([usage_finding(error)], error.exit_code, as_json=True)
    except Exception as error:  # noqa: BLE001 a user never sees a traceback without asking for it
        from quantmill.cli.errors import report, unexpected_finding

        if state["debug"]:
            import traceback

            traceback.print_exc()
        findings = (
            error.findings if isinstance(error, QuantmillError) else [unexpected_finding(error)]
        )
        return report(findings, PROBLEM, as_json=as_json)


@contextmanager
def _environment() -> Iterator[None]:
    """What a run changes in the process is put back: ``main`` is called by tests and tools too."""
    import logging

    disabled = logging.root.manager.disable
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name that the terminal can't show is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        logging.disable(disabled)
