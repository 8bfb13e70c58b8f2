"""From a prepared job to a live model: what ``load`` ends with, for frameworks to call too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from quantmill.architecture import Architecture
    from quantmill.job import Job
    from quantmill.stages.replace import ModelSink

    MakeSink = Callable[[Job, nn.Module, Architecture], ModelSink]

__all__ = ["load_job"]


def load_job(job: Job, make_sink: MakeSink | None = None) -> nn.Module:
    """Stages 4, 5 and 7 on a job that was prepared: build, fill, finish.

    ``make_sink(job, model, architecture)`` may give a sink that puts weights elsewhere than
    :class:`quantmill.stages.replace.ModelSink` does, which has all of them on the job's device.

    Raises:
        FindingsError: the errors of the job's plan; with ``strict``, fallbacks too.
        QuantmillError: a weight can't be read or quantized.
    """
    from quantmill.calibration.carry_out import carry_out
    from quantmill.stages.replace import ModelSink

    architecture = job.architecture
    assert job.plan is not None and architecture is not None
    job.plan.raise_errors()
    with job.stage("replace"):
        model = architecture.build()
        sink = (make_sink or ModelSink)(job, model, architecture)
        carry_out(job, sink)
        sink.tie()
        architecture.finish(model, job.device)
    with job.stage("finalize"):
        for answer in job.host.hook.quantmill_finalize(job=job, model=model):
            job.findings.extend(answer or ())
    if job.options.strict:
        job.findings.strict().raise_errors()
    return model
