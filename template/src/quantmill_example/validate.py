"""Findings about a job before a weight is read: ``job.plan`` tells what will happen.

Report everything and raise nothing. An error stops the job, a warning or a note is shown. Each
has a cause that names what is the matter and a fix that says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmill.findings import Finding, Severity, declare
from quantmill.job import Job

from quantmill_example.config import ExampleConfig

__all__ = ["check"]

RAGGED = declare("QM-EXAMPLE-010", "A width is no multiple of the group size", Severity.INFO)


def check(job: Job) -> Iterator[Finding]:
    """Widths that end with a shorter group, named once for all modules."""
    for label, selection in job.selections.items():
        config = selection.config
        if job.plan is None or not isinstance(config, ExampleConfig):
            continue
        ragged = [
            entry.name
            for entry in job.plan.modules
            if entry.method == label
            and entry.target is not None
            and entry.target.in_features % config.group_size
        ]
        if ragged:
            more = f" and {len(ragged) - 1} more" if len(ragged) > 1 else ""
            yield RAGGED(
                ragged[0] + more,
                f"the width is no multiple of {config.group_size}, so the last group of each row"
                " is shorter and has a scale of its own",
                "nothing to do; a smaller group_size may divide the width",
            )
