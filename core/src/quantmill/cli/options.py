"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["JSON", "QUIET", "memory_bytes", "model_options"]

Command = TypeVar("Command", bound=Callable[..., Any])

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress bars.")

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def memory_bytes(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """Parse ``8GiB``, ``512MiB`` or ``8GB``."""
    if value is None:
        return None
    import re

    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", value)
    if match is None or match.group(2).lower() not in _UNITS:
        raise click.BadParameter(f"{value!r} is no size; write 8GiB, 512MiB or 8GB")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def model_options(command: Command) -> Command:
    """``--device --dtype --skip --include --allow-unmatched --strict``."""
    for option in reversed(
        (
            click.option("--device", default="cpu", show_default=True, help="Torch device."),
            click.option(
                "--dtype",
                type=click.Choice(["bfloat16", "float16", "float32"]),
                help="Dtype of unquantized weights; the checkpoint's by default.",
            ),
            click.option("--skip", multiple=True, metavar="PATTERN", help="Keep these float."),
            click.option(
                "--include",
                multiple=True,
                metavar="PATTERN",
                help="Quantize these, whatever the defaults say.",
            ),
            click.option("--allow-unmatched", is_flag=True, help="A pattern may match no module."),
            click.option("--strict", is_flag=True, help="Fallbacks are errors."),
        )
    ):
        command = option(command)
    return command
