"""Converting a checkpoint: what a user calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.api import make_job, prepare
from quantmill.findings import FindingsError
from quantmill.host import Host
from quantmill.job import Job, Options, Progress

if TYPE_CHECKING:
    from quantmill.conversion.run import ConversionReport

__all__ = ["convert"]


def convert(
    source: str | Path,
    output: str | Path,
    method: Any,
    *,
    allow_requantize: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    calibration: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
    host: Host | None = None,
) -> ConversionReport:
    """Write a checkpoint in another format, without loss where both hold the same values.

    ``output`` is a new folder, or a file of a registered format (``.gguf``).
    ``method`` is METHOD as everywhere, or a dtype (``bf16``, ``fp16``, ``fp32``) for a float
    checkpoint. Fields of its config that it does not set follow the source; those that it sets
    are kept. ``allow_requantize`` lets weights that do not fit be dequantized and quantized anew,
    with ``calibration`` where the method needs it. ``verify`` decodes what was written and
    compares it with the source. A ``dry_run`` writes nothing and, without ``verify``, reads
    headers only. ``dtype`` is that of what is float in both; the source's own by default.

    Raises:
        FindingsError: every error found before anything is written, at once.
        QuantmillError: values would change and may not, or a weight can't be read or written;
            nothing is left behind.
    """
    from quantmill.conversion.goal import read_goal
    from quantmill.conversion.route import survey
    from quantmill.conversion.run import ConversionReport, carry, prove, target_job

    options = {
        "calibration": calibration,
        "samples": samples,
        "length": length,
        "seed": seed,
    }
    job = make_job(
        source, None, device=device, dtype=dtype, host=host, progress=progress, planning=True
    )
    _plan(job)
    goal = read_goal(job, method)
    if goal.method is not None and not job.prequantized:
        job = make_job(
            source, method, device=device, dtype=dtype, host=host, progress=progress, planning=True
        )
        _plan(job)
    route = survey(job, goal, read=not dry_run or verify)
    if dry_run:
        return ConversionReport(route)
    if not allow_requantize:
        route.refuse_error()
    exact = not any(step.kind in ("requantize", "quantize") for step in route.steps)
    made = target_job(job, goal, route, Path(output), Options(**options, exact=exact))
    report = carry(job, route, made, max_shard_bytes)
    if verify:
        again = make_job(output, None, device=device, host=host, progress=progress, planning=True)
        _plan(again)
        prove(job, route, again, report)
    return report


def _plan(job: Job) -> None:
    """Plan a source; that it would not fit into memory when loaded does not matter here."""
    made = prepare(job, allow_float=True)
    errors = [item for item in made.findings.errors if item.code != "QM-MEMORY-001"]
    if errors:
        raise FindingsError(errors)
