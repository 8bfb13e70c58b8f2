"""Options that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "DEVICE",
    "DTYPES",
    "IMATRIX",
    "JSON",
    "QUIET",
    "calibration_arguments",
    "calibration_file",
    "calibration_options",
    "memory_bytes",
    "model_options",
    "not_empty",
    "real_number",
]

Command = TypeVar("Command", bound=Callable[..., Any])

QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
DTYPES = ("bfloat16", "float16", "float32")

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
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")
_MAX_DIGITS = 20


def _debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        import logging

        context.ensure_object(dict)["debug"] = True
        logging.disable(logging.NOTSET)


def JSON(command: Command) -> Command:  # noqa: N802 used like the constants beside it
    """``--json``, and ``--debug`` after the command's name as well as before it."""
    # Not shown: the group's help has it, and it would be a line in every command's.
    debug = click.option("--debug", is_flag=True, hidden=True, expose_value=False, callback=_debug)
    option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    return option(debug(command))


def memory_bytes(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """Parse ``8GiB``, ``512MiB`` or ``8GB``."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value)
    if match is None or len(value) > _MAX_DIGITS or match.group(2).lower() not in _UNITS:
        raise click.BadParameter(f"{value!r} is no size; write 8GiB, 512MiB or 8GB")
    count = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if count < 1:
        raise click.BadParameter(f"{value!r} is less than a byte")
    return count


def not_empty(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse ``""``, which as a path would mean the current folder."""
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty")
    return value


def real_number(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Refuse NaN and infinity, which every range check lets through."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number to compute with")
    return value


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    # Only the form; whether torch has such a device is a finding of validation.
    if not re.fullmatch(r"[a-z]+(:[0-9]{1,4})?", value):
        raise click.BadParameter(f"{value!r} is no device; write cpu, cuda or cuda:0")
    return value


DEVICE = click.option(
    "--device", default="cpu", show_default=True, callback=_device, help="Torch device."
)


def model_options(command: Command) -> Command:
    """``--device --dtype --skip --include --allow-unmatched --strict``."""
    for option in reversed(
        (
            DEVICE,
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
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


calibration_file = click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text, JSONL or tokens for a calibrated method.",
)

IMATRIX = click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Importance matrix to weigh errors by, for methods that take one.",
)


def calibration_options(command: Command) -> Command:
    """``--calibration`` and what is taken from that file, for methods that need it."""
    for option in reversed(
        (
            calibration_file,
            click.option(
                "--calibration-samples",
                type=click.IntRange(min=1),
                default=128,
                show_default=True,
                help="Most windows of it.",
            ),
            click.option(
                "--calibration-length",
                type=click.IntRange(min=1),
                default=512,
                show_default=True,
                help="Tokens per window.",
            ),
            click.option(
                "--calibration-seed",
                type=click.IntRange(0, 2**63 - 1),
                default=0,
                show_default=True,
                help="Chooses the windows.",
            ),
        )
    ):
        command = option(command)
    return command


def calibration_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take those options out of ``options``, under the names that the Python interface uses."""
    return {
        "calibration": options.pop("calibration"),
        "samples": options.pop("calibration_samples"),
        "length": options.pop("calibration_length"),
        "seed": options.pop("calibration_seed"),
    }
