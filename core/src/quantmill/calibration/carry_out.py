"""Stage 4 for calibrated methods: the choice between the two engines, and the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.findings import QuantmillError, declare
from quantmill.job import Job
from quantmill.stages.quantize import Sink, run

if TYPE_CHECKING:
    from quantmill.calibration.data import CalibrationData

__all__ = ["calibration_data", "carry_out", "needs_calibration", "resume_folder"]

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
    from quantmill.calibration.data import read_calls
    from quantmill.calibration.engine import calibrate

    assert job.architecture is not None
    if job.architecture.source_name == "module":
        calibrate(job, sink, read_calls(job.options.calibration), None)
        return
    calibrate(job, sink, calibration_data(job), keep)


def calibration_data(job: Job) -> CalibrationData:
    """The windows of tokens that the job's options name.

    Raises:
        QuantmillError: no framework can build the model, or the data can't be read.
    """
    from quantmill.calibration.data import read_calibration

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
    vocabulary: Any = job.headers.config.get("vocab_size")
    return read_calibration(
        options.calibration,
        lambda: _tokenizer(job),
        samples=options.samples,
        length=options.length,
        seed=options.seed,
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
    )


def _tokenizer(job: Job) -> Any:
    from quantmill.checkpoint.containers import container_of
    from quantmill.registrations import resolve

    source = job.headers.source
    container = container_of(source.describe(), job.host)
    loaders: list[tuple[str | None, Any]] = [
        (item.tokenizer, source) for item in job.host.model_sources
    ]
    if container is not None:
        loaders = [(container.tokenizer, Path(source.describe()))]
    for loader, argument in loaders:
        made = resolve(loader)(argument) if loader is not None else None
        if made is not None:
            return made
    raise QuantmillError(
        NOT_ALONE(
            "tokenizer",
            "the source has no tokenizer that an installed framework reads",
            "add tokenizer.json, or give token ids: a .safetensors file with input_ids",
        )
    )
