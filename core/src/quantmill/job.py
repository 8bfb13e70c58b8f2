"""The job: the explicit object that stages pass along.

Nothing about a run is kept anywhere else. A framework may make a job and call the stages it
wants, in order; each reads what earlier ones put here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from quantmill.findings import Findings

if TYPE_CHECKING:
    from quantmill.architecture import Architecture
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.config import MethodConfig
    from quantmill.host import Host
    from quantmill.kernels import KernelRegistry
    from quantmill.planning import Plan
    from quantmill.processes import Processes
    from quantmill.registrations import Container, Method

__all__ = ["Job", "Options", "Request", "Selection", "named_progress"]

Progress = Callable[[int, int, str], None]


def named_progress(progress: Progress | None, name: str) -> Progress | None:
    """``progress`` for one run of several: ``name`` says which it is."""
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{name}: {what}")


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for: the grammar of METHOD, parsed but not yet typed."""

    raw: Mapping[str, Any] | None = None
    """Raw config, or None to take what the checkpoint says."""
    method: str | None = None
    """Name of the method when a short name said it."""
    text: str = ""
    """How the user wrote it, for messages."""
    label: str = ""
    """Short name that it stands for in plans and tables; empty for a config without one."""
    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    assign: Mapping[str, Request] = field(default_factory=dict)
    """Pattern to another method, for several methods in one model."""
    implied: frozenset[str] = frozenset()
    """Keys of ``raw`` that a peer's config object holds by default and nobody wrote: they are no
    contradiction to what a checkpoint says."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A method with the config it runs with."""

    label: str
    method: Method
    config: MethodConfig
    plugin: str = ""


@dataclass(slots=True)
class Options:
    """How to run, as opposed to what to make."""

    strict: bool = False
    """Fallbacks are errors."""
    non_finite: str = "error"
    """``error`` stops at NaN or infinity in a weight and names it; ``keep`` leaves such a module
    float, with a finding."""
    allow_unmatched: bool = False
    """A user's pattern may match nothing."""
    max_memory: Mapping[str, int] | None = None
    """Bytes allowed by device type; checked before anything is loaded."""
    placed: bool = False
    """A framework puts weights in several places: the device need not hold them all."""
    training: bool = False
    """Prepare for adapters on top of a frozen base (QLoRA)."""
    gradient_checkpointing: bool = True
    force_kernels: tuple[str, ...] = ()
    disable_kernels: tuple[str, ...] = ()
    dequantize: bool = False
    """Load a quantized checkpoint as a float model."""
    output: str | None = None
    """Folder or file to be written, for the disk space check."""
    calibration: Any = None
    """Calibration data: see :func:`quantmill.calibration.data.read_calibration`."""
    samples: int = 128
    """Most calibration windows."""
    length: int = 512
    """Tokens per calibration window."""
    seed: int = 0
    share: bool = True
    """Under ``torchrun``, share the work with the other processes, which run the same job."""
    exact: bool = False
    """Forms come from another checkpoint as they are: nothing is quantized, and no calibration
    data are needed."""
    planning: bool = False
    """Only a plan is asked for: that calibration data is needed is worth knowing, no error."""


@dataclass(slots=True)
class Job:
    """One run. Fields below ``progress`` are filled by the stages."""

    host: Host = field(repr=False)
    headers: CheckpointHeaders = field(repr=False)
    request: Request
    device: str = "cpu"
    dtype: str | None = None
    """Dtype of unquantized weights and activations; None for the checkpoint's own."""
    options: Options = field(default_factory=Options)
    progress: Progress | None = None

    findings: Findings = field(default_factory=Findings, repr=False)
    checkpoint_config: Selection | None = None
    """What a pre-quantized checkpoint says of itself."""
    selections: dict[str, Selection] = field(default_factory=dict)
    """Methods in use by label; the first is the main one."""
    assigned: dict[str, str] = field(default_factory=dict)
    """The request's ``assign`` patterns, each with the label of its selection."""
    stored_targets: dict[str, str] | None = None
    """Module (its name in the checkpoint) to label, when the checkpoint holds several methods."""
    architecture: Architecture | None = field(default=None, repr=False)
    container: Container | None = None
    """File format that is written; None for a folder, or for a model in memory."""
    plan: Plan | None = field(default=None, repr=False)
    _kernels: KernelRegistry | None = field(default=None, repr=False)
    _processes: Processes | None = field(default=None, repr=False)
    state: dict[str, Any] = field(default_factory=dict, repr=False)
    """For plugins that implement several stages: keyed by plugin name."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Job:
        # A copied model is of the same run: hosts and sources are not copied with it.
        return self

    @property
    def prequantized(self) -> bool:
        """The checkpoint's weights are quantized already."""
        return self.checkpoint_config is not None

    @property
    def compute_dtype(self) -> str:
        """Torch name of the dtype of unquantized weights and activations."""
        stored = self.architecture.default_dtype if self.architecture is not None else None
        return self.dtype or stored or "bfloat16"

    @property
    def kernels(self) -> KernelRegistry:
        """The kernels this job may use."""
        if self._kernels is None:
            from quantmill.kernels import KernelRegistry

            self._kernels = KernelRegistry.of(
                self.host,
                force=self.options.force_kernels,
                disable=self.options.disable_kernels,
            )
        return self._kernels

    @property
    def processes(self) -> Processes:
        """The processes of this job; asking joins those that ``torchrun`` started."""
        if self._processes is None:
            from quantmill.processes import ALONE, Processes

            self._processes = Processes.from_environment() if self.options.share else ALONE
        return self._processes

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage to the observation hooks."""
        self.host.hook.quantmill_stage_started(job=self, stage=name)
        start = perf_counter()
        yield
        self.host.hook.quantmill_stage_finished(
            job=self, stage=name, seconds=perf_counter() - start
        )

    def advance(self, done: int, total: int, what: str) -> None:
        """Report progress in bytes to the caller and to plugins."""
        if self.progress is not None:
            self.progress(done, total, what)
        self.host.hook.quantmill_progress(job=self, done=done, total=total, what=what)
