"""Findings of the integration about a job's plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from quantmill.findings import Finding, Severity, declare
from quantmill_transformers.architecture import TransformersArchitecture

if TYPE_CHECKING:
    from quantmill.job import Job

__all__ = ["check"]

OWN_LINEARS = declare(
    "QM-TF-003",
    "The model's linears are of a class of its own and stay float",
    Severity.WARNING,
    fallback=True,
)


def check(job: Job) -> Iterable[Finding]:
    """Say so where nothing is quantized because the architecture has linears of its own."""
    architecture = job.architecture
    if not isinstance(architecture, TransformersArchitecture) or job.plan is None:
        return
    if not job.selections or any(item.action == "quantize" for item in job.plan.modules):
        return
    own = [
        (name, type(module).__name__)
        for name, module in architecture.skeleton.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear
    ]
    if own:
        name, cls = own[0]
        yield OWN_LINEARS(
            name + (f" and {len(own) - 1} more" if len(own) > 1 else ""),
            f"{cls} is not nn.Linear itself, which is all that transformers' quantizers replace;"
            " nothing would be quantized",
            "take another architecture, or load it as float",
        )
