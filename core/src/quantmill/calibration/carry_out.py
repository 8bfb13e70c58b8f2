"""Stage 4 for calibrated methods: the choice between the two engines, and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantmill.findings import QuantmillError, declare
from quantmill.job import Job
from quantmill.stages.quantize import Sink, run

__all__ = ["carry_out", "needs_calibration", "resume_folder"]

NOT_ALONE = declare("QM-CALIB-050", "Calibration needs a framework that builds the model")


def needs_calibration(job: Job) -> bool:
    """Whether a planned target's method quantizes only with calibration data."""
    if job.prequantized:
        return False
    return any(
        item.method.capabilities.calibrated and not item.method.capabilities.on_the_fly
        for item in job.selections.values()
    )


def resume_folder(output: Path) -> Path:
    """Where an unfinished calibrated job for ``output`` keeps what it has done."""
    return output.absolute().parent / f".{output.name}.quantmill-unfinished"


def carry_out(job: Job, sink: Sink | None, keep: Path | None = None) -> None:
    """Run the engine that the job's methods need, into ``sink``; without one, help the processes
    that have one.

    Raises:
        QuantmillError: see the two engines.
    """
    if not needs_calibration(job):
        if sink is not None:
            run(job, sink)
        return
    from quantmill.calibration.data import read_calibration, read_calls
    from quantmill.calibration.engine import calibrate

    assert job.architecture is not None
    if job.architecture.source_name == "headers":
        raise QuantmillError(
            NOT_ALONE(
                "model",
                "its blocks have to run, and no installed framework can build it",
                'pip install "quantmill[transformers]"',
            )
        )
    options = job.options
    if job.architecture.source_name == "module":
        calibrate(job, sink, read_calls(options.calibration), None)
        return
    vocabulary: Any = job.headers.config.get("vocab_size")
    data = read_calibration(
        options.calibration,
        lambda: _tokenizer(job),
        samples=options.samples,
        length=options.length,
        seed=options.seed,
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
    )
    calibrate(job, sink, data, keep)


def _tokenizer(job: Job) -> Any:
    from quantmill.registrations import resolve

    for source in job.host.model_sources:
        loader = resolve(source.tokenizer) if source.tokenizer else None
        made = loader(job.headers.source) if loader else None
        if made is not None:
            return made
    raise QuantmillError(
        NOT_ALONE(
            "tokenizer",
            "the source has no tokenizer that an installed framework reads",
            "add tokenizer.json, or give token ids: a .safetensors file with input_ids",
        )
    )
