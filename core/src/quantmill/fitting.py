"""Which installed methods fit a model into a given memory, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.api import make_job, prepare
from quantmill.findings import Finding, QuantmillError, declare
from quantmill.host import Host, default_host
from quantmill.job import Progress
from quantmill.memory import Needs, needs
from quantmill.plugin_info import Status

if TYPE_CHECKING:
    from quantmill.architecture import Architecture
    from quantmill.job import Job
    from quantmill.planning import Plan
    from quantmill.registrations import Method

__all__ = ["FLOAT", "Candidate", "Situation", "fits"]

STORED = declare("QM-CHOOSE-001", "The model to choose a method for is quantized already")
TOO_LARGE = declare("QM-CHOOSE-010", "A method does not fit into the memory")
NOT_TRAINABLE = declare("QM-CHOOSE-011", "A method's linears pass no gradients")
NOT_INSTALLED = declare("QM-CHOOSE-012", "A plugin can't be used here")
FLOAT = "float"
"""Name of the candidate that keeps the model as it is."""
_ANY_MEMORY = "QM-MEMORY-001"


@dataclass(frozen=True, slots=True)
class Situation:
    """What a model is wanted for."""

    memory: int
    """Bytes there are."""
    device: str = "cpu"
    dtype: str | None = None
    context: int = 2048
    """Tokens of the key-value cache, or of a training sequence."""
    training: bool = False
    rank: int = 16
    """Of the adapters."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method and whether a model fits with it."""

    name: str
    summary: str
    bits_per_weight: float
    loss_bits: float
    """Bits of each code that are given up against 16."""
    calibrated: bool
    """Quantizes with calibration data only."""
    bytes: int
    """On the disk."""
    needs: Needs | None
    """None where it can't be planned."""
    finding: Finding | None
    """Why it can't be taken."""

    @property
    def fits(self) -> bool:
        """Whether it can be taken."""
        return self.finding is None

    @property
    def reason(self) -> str:
        """In words: why it can't be taken, or what it is."""
        return self.summary if self.finding is None else self.finding.cause

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "name": self.name,
            "fits": self.fits,
            "bytes": self.bytes,
            "needs": None if self.needs is None else self.needs.to_dict(),
            "peak": 0 if self.needs is None else self.needs.peak,
            "bits_per_weight": self.bits_per_weight,
            "loss_bits": self.loss_bits,
            "calibrated": self.calibrated,
            "reason": self.reason,
            "finding": None if self.finding is None else self.finding.to_dict(),
        }


def fits(
    source: str | Path | Any,
    memory: int,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    context: int = 2048,
    training: bool = False,
    rank: int = 16,
    methods: Sequence[str] = (),
    progress: Progress | None = None,
    host: Host | None = None,
) -> list[Candidate]:
    """Every installed method for ``memory`` bytes: those that fit first, least loss first.

    ``methods`` are the short names to consider, all by default. ``memory`` must hold the weights,
    the loader's working set, and what computing needs: a key-value cache and activations for
    ``context`` tokens, or in ``training`` adapters of ``rank`` with their optimizer. The model as
    it is (``float``) is among the candidates.

    Raises:
        QuantmillError: the source can't be read, or is quantized already.
    """
    host = host or default_host()
    situation = Situation(memory, device, dtype, context, training, rank)
    first = make_job(source, None, device=device, dtype=dtype, host=host, planning=True)
    if first.headers.config.get("quantization_config"):
        raise QuantmillError(
            STORED(
                first.headers.source.describe(),
                "its weights are quantized, and quantizing them again would add error",
                "give the float checkpoint, or plan this one as it is: `quantmill plan SOURCE`",
            )
        )
    plain = _judged(first, FLOAT, None, 0.0, situation)
    found = [plain] if not methods or FLOAT in methods else []
    architecture = first.architecture
    wanted = {k: v for k, v in host.presets.items() if not methods or k in methods}
    for index, (name, (method, preset)) in enumerate(wanted.items()):
        if progress is not None:
            progress(index, len(wanted), name)
        loss = max(0.0, 16.0 - preset.bits)
        try:
            job = make_job(
                first.headers, name, device=device, dtype=dtype, host=host, planning=True
            )
        except QuantmillError as error:
            found.append(_refused(name, method, loss, error.findings[0]))
            continue
        job.architecture = architecture
        found.append(_judged(job, name, method, loss, situation))
    if not methods:
        found += _unusable(host)
    return sorted(
        found, key=lambda item: (not item.fits, item.loss_bits, item.name != FLOAT, item.name)
    )


def _judged(
    job: Job, name: str, method: Method | None, loss: float, situation: Situation
) -> Candidate:
    try:
        made = prepare(job, allow_float=method is None)
    except QuantmillError as error:
        return _refused(name, method, loss, error.findings[0])
    wanted = needs(
        made,
        _settings(job.architecture),
        context=situation.context,
        training=situation.training,
        rank=situation.rank,
    )
    totals = made.totals
    able = method.capabilities if method is not None else None
    finding = next((item for item in made.findings.errors if item.code != _ANY_MEMORY), None)
    if finding is None and situation.training and able is not None and not able.trainable:
        finding = NOT_TRAINABLE(
            name, "its linears pass no gradients to adapters", "take a method that is trainable"
        )
    if finding is None and wanted.peak > situation.memory:
        finding = TOO_LARGE(
            name,
            f"needs {wanted.peak:,} bytes at its peak, {situation.memory:,} are allowed",
            "take fewer bits, a shorter context, or more memory",
        )
    return Candidate(
        name=name,
        summary=method.summary if method is not None else f"as it is, {made.dtype}",
        bits_per_weight=totals["bits_per_weight"] if totals["quantized"] else _kept_bits(made),
        loss_bits=loss,
        calibrated=able is not None and able.calibrated and not able.on_the_fly,
        bytes=totals["bytes_after"],
        needs=wanted,
        finding=finding,
    )


def _kept_bits(plan: Plan) -> float:
    """Bits per weight of the linears where none is quantized."""
    kept = [item for item in plan.modules if item.kind in ("linear", "conv1d")]
    weights = sum(item.parameters for item in kept)
    return 8 * sum(item.bytes_after for item in kept) / weights if weights else 0.0


def _settings(architecture: Architecture | None) -> Any:
    assert architecture is not None
    return architecture.settings


def _refused(name: str, method: Method | None, loss: float, finding: Finding) -> Candidate:
    summary = method.summary if method is not None else ""
    return Candidate(name, summary, 0.0, loss, False, 0, None, finding)


def _unusable(host: Host) -> Iterator[Candidate]:
    """Plugins that are there and can't be used: their methods are not known."""
    for info in host.plugins.values():
        if info.status not in (Status.OK, Status.DISABLED):
            finding = NOT_INSTALLED(
                info.name, f"{info.status.value}: {info.reason}", "see `quantmill plugins`"
            )
            yield _refused(f"({info.name})", None, 16.0, finding)
