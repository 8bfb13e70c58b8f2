"""``quantmill.imatrix``: an importance matrix from a float model and a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from quantmill.api import make_job, prepare
from quantmill.findings import Findings, QuantmillError, Severity, declare
from quantmill.host import Host, default_host
from quantmill.job import Progress
from quantmill.registrations import Container, resolve
from quantmill.requirements import missing_requirements

if TYPE_CHECKING:
    from quantmill.calibration.importance import Measured

__all__ = ["ImatrixReport", "imatrix"]

NO_FORMAT = declare("QM-IMATRIX-001", "No installed plugin writes importance matrices so")
EXISTS = declare("QM-IMATRIX-002", "The importance matrix is there already")
FLOAT_WANTED = declare("QM-IMATRIX-003", "An importance matrix needs the float model")
UNREACHED = declare(
    "QM-IMATRIX-004", "The text reaches some experts with no token", Severity.WARNING
)


@dataclass(frozen=True, slots=True)
class ImatrixReport:
    """An importance matrix that was written."""

    path: Path
    modules: int
    """Linears that were measured."""
    windows: int
    tokens: int
    """Of all windows."""
    seconds: float
    findings: Findings

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "path": str(self.path),
            "modules": self.modules,
            "windows": self.windows,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "findings": self.findings.to_list(),
        }


def imatrix(
    source: str | Path,
    output: str | Path,
    *,
    calibration: Any,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    head: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    host: Host | None = None,
) -> ImatrixReport:
    """Run a float model on a text and write how large the inputs of its linears are.

    The model streams block by block, as for calibrated methods. The ending of ``output`` says in
    which format it is written.

    Args:
        source: folder, file or Hub id of the float model.
        output: the file to write; one that is there is not replaced.
        calibration: a path, texts or token ids.
        samples: most windows of it, chosen by ``seed``.
        length: tokens per window.
        seed: of that choice.
        head: also the output head's inputs.
        device: torch device.
        dtype: to compute in; the checkpoint's by default.
        skip: patterns of modules to leave out.
        progress: gets blocks done, all of them, and the block at hand.
        host: plugins to ask.

    Raises:
        QuantmillError: nothing is then written.
    """
    from quantmill.calibration.carry_out import calibration_data
    from quantmill.calibration.importance import measure

    start = perf_counter()
    host = host or default_host()
    path = Path(output)
    container = _format(path, host)
    if path.exists():
        raise QuantmillError(EXISTS(str(path), "a file of that name exists", "give another name"))
    job = make_job(
        source,
        container.methods[0],
        device=device,
        dtype=dtype,
        skip=skip,
        host=host,
        progress=progress,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        share=False,
    )
    if job.headers.config.get("quantization_config"):
        cause = "its weights are quantized: what they multiply tells of their errors too"
        fix = "give the model that it was quantized from"
        raise QuantmillError(FLOAT_WANTED(str(source), cause, fix))
    prepare(job).raise_errors()
    data = calibration_data(job)
    text = Path(calibration).name if isinstance(calibration, str | Path) else "given texts"
    measured = measure(job, data, text, head=head)
    _warn(job.findings, measured)
    assert container.importance is not None
    resolve(container.importance)(job, measured, path)
    return ImatrixReport(
        path,
        len(measured.squares),
        measured.windows,
        measured.windows * measured.length,
        perf_counter() - start,
        job.findings,
    )


def _format(path: Path, host: Host) -> Container:
    """The format that a file of this name would have."""
    known = [item for item in host.containers if item.importance is not None and item.methods]
    for item in known:
        fits = item.importance_suffixes and path.name.lower().endswith(item.importance_suffixes)
        if fits and not missing_requirements(item.requirements):
            return item
    suffixes = [suffix for item in known for suffix in item.importance_suffixes]
    fix = f"give it the ending {' or '.join(suffixes)}" if suffixes else "install quantmill[gguf]"
    raise QuantmillError(NO_FORMAT(str(path), "its ending is no known format's", fix))


def _warn(findings: Findings, measured: Measured) -> None:
    none = [name for name, item in measured.squares.items() if item.tokens == 0]
    if none:
        cause = f"{len(none)} of {len(measured.squares)} linears saw no token: {none[0]} is one"
        fix = "measure with more text (--calibration-samples), or other text"
        findings.add(UNREACHED(none[0], cause, fix))
