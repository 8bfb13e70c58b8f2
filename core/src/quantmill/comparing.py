"""Comparing two checkpoints of one model: what a user calls."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from quantmill.api import load, make_job, prepare
from quantmill.findings import Findings, FindingsError, QuantmillError
from quantmill.host import Host
from quantmill.job import Job, Progress
from quantmill.judging import Judge

if TYPE_CHECKING:
    from quantmill.comparison.report import Comparison, Judgement

__all__ = ["compare"]


def compare(
    first: str | Path,
    second: str | Path,
    *,
    text: str | Path | None = None,
    context: int | None = None,
    max_windows: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    host: Host | None = None,
) -> Comparison:
    """Two checkpoints of one model in any formats: weights, bytes and, with ``text`` (a file, or
    the text itself), what they compute. The first is the reference.

    Raises:
        QuantmillError: they are not of one model, or one of them can't be read.
    """
    from quantmill.comparison.report import RESCALED, UNRELATED, Comparison
    from quantmill.comparison.weights import Side, compare_weights

    start = perf_counter()
    jobs = [_job(source, host, progress) for source in (first, second)]
    findings = Findings([*jobs[0].findings.warnings, *jobs[1].findings.warnings])
    with Side(jobs[0]) as a, Side(jobs[1]) as b:
        modules = list(compare_weights(a, b, findings))
    names = (jobs[0].headers.source.describe(), jobs[1].headers.source.describe())
    found = Comparison(
        names=names,
        methods=(_method(jobs[0]), _method(jobs[1])),
        modules=modules,
        bytes=(jobs[0].headers.total_bytes, jobs[1].headers.total_bytes),
        findings=findings,
    )
    found.rescaled = any(not m.is_matrix and m.distance.relative > 0.01 for m in modules)
    if found.rescaled:
        moved = next(m for m in modules if not m.is_matrix and m.distance.relative > 0.01)
        findings.add(
            RESCALED(
                moved.name,
                f"{moved.name} differs by {moved.distance.relative:.0%}: calibration moved scales"
                " between weights, so their errors are taken with columns scaled to fit",
                "judge by what the models compute: give a text",
            )
        )
    elif found.total.relative > 1.0:
        raise QuantmillError(
            UNRELATED(
                f"{names[0]} and {names[1]}",
                f"their difference is {found.total.relative:.2f} times as large as the weights",
                "give two checkpoints of one model",
            )
        )
    if text is not None:
        found.judgement = _judge(first, second, jobs, text, context, max_windows, device, progress)
    found.seconds = perf_counter() - start
    return found


def _job(source: str | Path, host: Host | None, progress: Progress | None) -> Job:
    job = make_job(source, None, host=host, progress=progress, planning=True)
    made = prepare(job, allow_float=True)
    errors = [item for item in made.findings.errors if item.code != "QM-MEMORY-001"]
    if errors:
        raise FindingsError(errors)
    return job


def _method(job: Job) -> str:
    assert job.plan is not None
    if not job.prequantized:
        return f"float, {job.plan.dtype}"
    return ", ".join(job.plan.methods.values())


def _judge(
    first: str | Path,
    second: str | Path,
    jobs: list[Job],
    text: str | Path,
    context: int | None,
    max_windows: int | None,
    device: str,
    progress: Progress | None,
) -> Judgement:
    from quantmill.comparison.report import Judgement
    from quantmill.evaluate.texts import named_text

    words, name = named_text(text)
    judge = Judge(
        first,
        words,
        device=device,
        context=context,
        max_windows=max_windows,
        others=(jobs[1].headers.config,),
        host=jobs[0].host,
    )
    judge.reference(progress)
    model = load(second, device=device, host=jobs[0].host, progress=progress)
    result = judge.judge(model, progress)
    assert result.kl_mean is not None and result.top1_agreement is not None
    return Judgement(
        text=name,
        tokens=result.tokens,
        windows=result.windows,
        context=result.context,
        perplexity=(judge.perplexity(), result.perplexity),
        kl=result.kl_mean,
        kl_interval=result.kl_interval(),
        top1_agreement=result.top1_agreement,
    )
