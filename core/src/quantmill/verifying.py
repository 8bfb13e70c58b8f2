"""Verifying a checkpoint: what a user calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.api import make_job, prepare
from quantmill.findings import QuantmillError
from quantmill.host import Host
from quantmill.job import Progress

if TYPE_CHECKING:
    from quantmill.verification.run import Verification

__all__ = ["verify"]


def verify(
    source: str | Path, *, progress: Progress | None = None, host: Host | None = None
) -> Verification:
    """Look at every tensor of a checkpoint: shapes, codes, scales, zero points, group index, NaN,
    ties, checksums, and whether the config describes what is there. No model is built.

    Problems are in ``findings`` of what is returned; errors among them make it not ``sound``.

    Raises:
        QuantmillError: there is nothing to look at: the headers can't be read.
    """
    from quantmill.verification.run import verify_job

    job = make_job(source, None, host=host, progress=progress, planning=True)
    try:
        prepare(job, allow_float=True)
    except QuantmillError as error:
        job.findings.extend(error.findings)
    return verify_job(job)
