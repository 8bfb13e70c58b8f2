"""Which method to take for a model and a memory: what fits, and what it costs, measured."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from quantmill.api import make_job, prepare, quantize
from quantmill.findings import Finding, Findings, QuantmillError, declare
from quantmill.fitting import FLOAT, Candidate, fits
from quantmill.host import Host, default_host
from quantmill.job import Progress, named_progress
from quantmill.judging import Judge
from quantmill.stages.select import unknown_method

if TYPE_CHECKING:
    from quantmill.evaluate import EvalResult

__all__ = ["Choice", "Measured", "choose"]

UNCALIBRATED = declare("QM-CHOOSE-020", "A method can't be measured without calibration data")


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate, and what the model computes with it."""

    candidate: Candidate
    kl: float | None = None
    """Mean KL divergence from the float model, nats per token."""
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    seconds: float = 0.0
    """Quantizing and running."""
    finding: Finding | None = None
    """Why it fits and was not measured."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            **self.candidate.to_dict(),
            "kl": self.kl,
            "kl_interval": self.kl_interval,
            "top1_agreement": self.top1_agreement,
            "perplexity": self.perplexity,
            "seconds": self.seconds,
            "unmeasured": None if self.finding is None else self.finding.to_dict(),
        }


@dataclass(slots=True)
class Choice:
    """All candidates: those that fit first, the best of them at the top."""

    source: str
    memory: int
    use: str
    """``infer`` or ``train``."""
    device: str
    context: int
    candidates: list[Measured]
    text: str = ""
    """Name of the text, empty where nothing was measured."""
    tokens: int = 0
    """Scored on the text."""
    findings: Findings = field(default_factory=Findings)
    seconds: float = 0.0

    @property
    def best(self) -> Measured | None:
        """What to take: the first that fits."""
        return next((item for item in self.candidates if item.candidate.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "source": self.source,
            "memory": self.memory,
            "for": self.use,
            "device": self.device,
            "context": self.context,
            "text": self.text,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": None if self.best is None else self.best.candidate.name,
            "candidates": [item.to_dict() for item in self.candidates],
            "findings": self.findings.to_list(),
        }


def choose(
    source: str | Path,
    memory: int,
    *,
    text: str | Path | None = None,
    calibration: Any = None,
    use: str = "infer",
    device: str = "cpu",
    dtype: str | None = None,
    context: int = 2048,
    rank: int = 16,
    methods: Sequence[str] = (),
    measure: int = 12,
    max_windows: int | None = 16,
    progress: Progress | None = None,
    host: Host | None = None,
) -> Choice:
    """Which method a model fits with into ``memory`` bytes, and which costs least.

    Candidates are the short names of all installed methods, or ``methods``. With ``text`` (a file,
    or the text itself) the first ``measure`` that fit, least loss first, are run against the float
    model, block by block, so that neither it nor they need be in memory; those that quantize
    with data need ``calibration``.

    Args:
        source: a float model.
        memory: bytes for weights, cache or optimizer, and work.
        text: to measure on.
        calibration: as :func:`quantmill.quantize` takes it.
        use: ``infer`` or ``train`` (adapters on a frozen base).
        device: torch device.
        dtype: of activations and unquantized weights; the checkpoint's own by default.
        context: tokens of the cache, or of a training sequence.
        rank: of the adapters.
        methods: short names to consider; all by default.
        measure: how many to run.
        max_windows: of the text.
        progress: told about bytes and blocks.
        host: of plugins.

    Raises:
        QuantmillError: the source can't be read or is quantized already, a method is unknown, or
            the text is too short.
    """
    start = perf_counter()
    host = host or default_host()
    unknown = [name for name in methods if name not in host.presets and name != FLOAT]
    if unknown:
        raise QuantmillError(*(unknown_method(name, host) for name in unknown))
    words, name = None, ""
    if text is not None:
        from quantmill.evaluate.texts import named_text

        words, name = named_text(text)
    found = fits(
        source,
        memory,
        device=device,
        dtype=dtype,
        context=context,
        training=use == "train",
        rank=rank,
        methods=methods,
        progress=progress,
        host=host,
    )
    made = Choice(str(source), memory, use, device, context, [Measured(item) for item in found])
    if words is not None and any(item.fits for item in found):
        judge = Judge(
            source, words, device=device, max_windows=max_windows, streaming=True, host=host
        )
        # Progress of each run goes over its blocks; the name says which run it is.
        judge.reference(named_progress(progress, "float model"))
        made.candidates = _measured(judge, found, measure, calibration, dtype, progress, host)
        made.text = name
        made.tokens = sum(item.scored for item in judge.windows())
        made.findings.extend(judge.findings)
    made.seconds = perf_counter() - start
    return made


def _measured(
    judge: Judge,
    found: list[Candidate],
    measure: int,
    calibration: Any,
    dtype: str | None,
    progress: Progress | None,
    host: Host,
) -> list[Measured]:
    left, rows = measure, []
    for item in found:
        if not item.fits or left == 0:
            rows.append(Measured(item))
            continue
        if item.calibrated and calibration is None:
            cause = "it quantizes with calibration data, and none was given"
            finding = UNCALIBRATED(item.name, cause, "give a text: --calibration FILE")
            rows.append(Measured(item, finding=finding))
            continue
        left -= 1
        rows.append(
            _run(judge, item, calibration, dtype, named_progress(progress, item.name), host)
        )
    return sorted(
        rows,
        key=lambda row: (
            not row.candidate.fits,
            row.kl is None,
            row.kl or 0.0,
            row.candidate.bytes if row.kl is not None else 0,
        ),
    )


def _run(
    judge: Judge,
    item: Candidate,
    calibration: Any,
    dtype: str | None,
    progress: Progress | None,
    host: Host,
) -> Measured:
    start = perf_counter()
    shared: dict[str, Any] = {"device": judge.device, "dtype": dtype, "host": host}
    try:
        with tempfile.TemporaryDirectory(prefix="quantmill-choose-") as folder:
            source, method = judge.source, None if item.name == FLOAT else item.name
            if item.calibrated:
                made = Path(folder) / "model"
                quantize(source, made, method, calibration=calibration, progress=progress, **shared)
                source, method = made, None
            job = make_job(source, method, progress=progress, **shared)
            prepare(job, allow_float=method is None)
            result: EvalResult = judge.judge_streaming(job)
    except QuantmillError as error:
        return Measured(item, seconds=perf_counter() - start, finding=error.findings[0])
    finally:
        gc.collect()
    return Measured(
        item,
        kl=result.kl_mean,
        kl_interval=result.kl_interval(),
        top1_agreement=result.top1_agreement,
        perplexity=result.perplexity,
        seconds=perf_counter() - start,
    )
