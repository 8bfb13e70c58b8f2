"""What the command line itself finds wrong, and how every error is shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantmill.cli.output import print_json, show_findings
from quantmill.findings import Finding, declare

if TYPE_CHECKING:
    import click

__all__ = ["report", "unexpected_finding", "usage_finding"]

WRONG_USAGE = declare("QM-CLI-001", "The command line can't be understood")
FILE_ERROR = declare("QM-CLI-002", "A file can't be read or written")
UNEXPECTED = declare("QM-CLI-003", "Something failed in a way nobody foresaw")
INTERRUPTED_RUN = declare("QM-CLI-004", "The command was interrupted")
CANT_GENERATE = declare("QM-CLI-006", "The model can't continue a prompt")
NO_SUCH_MODULE = declare("QM-CLI-007", "The model has no such module, or it stays float")


def usage_finding(error: click.ClickException) -> Finding:
    """A mistake on the command line as a finding."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "quantmill"
    return WRONG_USAGE(path, error.format_message(), f"see `{path} --help`")


def unexpected_finding(error: Exception) -> Finding:
    """An exception that carries no findings."""
    cause = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        where = str(error.filename) if error.filename is not None else "files"
        return FILE_ERROR(where, error.strerror or cause, "check the path, its rights and the disk")
    return UNEXPECTED("quantmill", cause, "run it again with --debug, and report what it shows")


def report(findings: Sequence[Finding], code: int, *, as_json: bool) -> int:
    """Show the findings of an error, on stdout as JSON or on stderr in words; give ``code``."""
    if as_json:
        try:
            print_json({"error": True, "findings": [item.to_dict() for item in findings]})
            sys.stdout.flush()
            return code
        except OSError:
            pass  # stdout itself is what failed
    show_findings(findings)
    return code
