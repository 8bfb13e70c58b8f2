"""The contract between quantmill and its plugins. Read this first.

A plugin is a module that an installed distribution names in the entry point group
``quantmill.plugins``. It marks functions with :data:`hookimpl`; each implements one hook below.
Plugins see three kinds of hooks:

1. *Registration*: what exists. Called once per process, right after discovery, before any job.
   An implementation returns frozen dataclasses of :mod:`quantmill.registrations`; it must import
   neither torch nor a vendor library (``quantmill plugins`` and ``--help`` call it).
2. *Stages*: what happens to a model, in the order of the workflow. Each gets the explicit
   :class:`quantmill.job.Job` of the run. The core itself is a plugin here: its implementations
   run last and delegate to what the job's method registered, so that most backends implement no
   stage hook at all. Implement one to answer for your method differently, or for all methods
   (a validator package, a targeting policy, a tracer).
3. *Observation*: what is happening, for progress bars, frameworks and tracing.

Three words about results. *All answers*: every plugin is asked, and the lists are joined in the
order of registration. *First answer*: plugins are asked until one returns something else than
``None``. An exception from an implementation stops the job, with the plugin and the hook named.

Stability: ``HOOK_API_VERSION`` is raised when a hook or field is removed or changes its meaning.
The core takes plugins of this version and of the one before. A plugin states its version in a
module attribute ``QUANTMILL_API = <int>``. Additions (hooks, fields with defaults, trailing
arguments) do not raise it: pluggy passes an implementation only the arguments it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantmill.backend import WeightSource
    from quantmill.config import MethodConfig
    from quantmill.findings import Finding
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.registrations import (
        CodecRegistration,
        ConfigReader,
        Container,
        Finalizer,
        Kernel,
        Method,
        ModelSource,
        Requirement,
        TargetingRule,
        Validator,
    )
    from quantmill.targeting.types import Rule, Target

__all__ = [
    "ENTRY_POINT_GROUP",
    "HOOK_API_VERSION",
    "SUPPORTED_API_VERSIONS",
    "hookimpl",
    "hookspec",
]

HOOK_API_VERSION = 1
"""Version of this contract."""
SUPPORTED_API_VERSIONS = (HOOK_API_VERSION,)
"""Versions the core takes: this one and, once there is one, the one before."""
ENTRY_POINT_GROUP = "quantmill.plugins"

hookspec = pluggy.HookspecMarker("quantmill")
hookimpl = pluggy.HookimplMarker("quantmill")


# --- Registration: all answers; data only; once per process ------------------------------------


@hookspec
def quantmill_requirements() -> Sequence[Requirement]:  # type: ignore[empty-body]
    """What the plugin as a whole needs. Checked from metadata before any other hook is called;
    a missing requirement that is not optional gives the plugin the status ``missing
    requirement`` and none of its registrations take part."""


@hookspec
def quantmill_methods() -> Sequence[Method]:  # type: ignore[empty-body]
    """The quantization methods of this plugin."""


@hookspec
def quantmill_dialects() -> Sequence[ConfigReader]:  # type: ignore[empty-body]
    """The peers' configuration dialects this plugin understands."""


@hookspec
def quantmill_codecs() -> Sequence[CodecRegistration]:  # type: ignore[empty-body]
    """Disk layouts, for loading and for conversion."""


@hookspec
def quantmill_kernels() -> Sequence[Kernel]:  # type: ignore[empty-body]
    """Implementations of operations on forms."""


@hookspec
def quantmill_model_sources() -> Sequence[ModelSource]:  # type: ignore[empty-body]
    """Frameworks that turn a checkpoint folder into a module tree."""


@hookspec
def quantmill_containers() -> Sequence[Container]:  # type: ignore[empty-body]
    """File formats that hold a whole checkpoint in one file."""


@hookspec
def quantmill_validators() -> Sequence[Validator]:  # type: ignore[empty-body]
    """Checks to run before a job, for some methods or for all."""


@hookspec
def quantmill_targeting_rules() -> Sequence[TargetingRule]:  # type: ignore[empty-body]
    """Rules to add to every job's targeting."""


@hookspec
def quantmill_finalizers() -> Sequence[Finalizer]:  # type: ignore[empty-body]
    """Steps to run on the finished model."""


# --- Stage 1: configuration --------------------------------------------------------------------


@hookspec(firstresult=True)
def quantmill_configure(
    job: Job, raw: Mapping[str, Any], origin: str
) -> tuple[str, MethodConfig] | None:
    """Turn a raw mapping into a typed, frozen config. First answer.

    Called by :func:`quantmill.stages.configure` for what a user gave (``origin="user"``: unknown
    keys are errors with a suggestion) and for a checkpoint's ``quantization_config``
    (``origin="checkpoint"``: unknown keys are findings and kept).

    Returns:
        The method's name and its config, or None when the dialect is not known here.
    """


# --- Stage 2: selection ------------------------------------------------------------------------


@hookspec
def quantmill_select(job: Job, name: str) -> Selection | None:
    """Say which registered method carries out ``name`` with the job's config. All answers: two
    plugins that select different methods for one job are an error that names both."""


# --- Stage 3: validation before anything is loaded ---------------------------------------------


@hookspec
def quantmill_validate(job: Job) -> Iterable[Finding]:  # type: ignore[empty-body]
    """Everything that is wrong or worth knowing: libraries, versions, device, config, shapes,
    memory, disk. All answers; never raises for a user's mistake, never stops at the first."""


# --- Stage 6 of the workflow, run before 4 because a plan precedes the work: targeting ---------


@hookspec
def quantmill_target(job: Job) -> Iterable[Rule]:  # type: ignore[empty-body]
    """Rules that decide which modules are quantized and by which of the job's methods. All
    answers; the most specific rule wins, equal ones that disagree are an error."""


# --- Stage 4: weight quantization --------------------------------------------------------------


@hookspec(firstresult=True)
def quantmill_quantize(
    job: Job, selection: Selection, target: Target, weight: WeightSource
) -> Form | None:
    """Quantize one target. First answer.

    Called once per target in the order of the checkpoint's files. ``weight`` streams a float
    matrix ``[out_features, in_features]`` (or ``[experts, out, in]``) and is valid during the
    call only. The source is dropped when the hook returns.
    """


# --- Stage 5: linear replacement ---------------------------------------------------------------


@hookspec(firstresult=True)
def quantmill_replace(
    job: Job,
    selection: Selection,
    target: Target,
    module: nn.Module,
    form: Form,
    bias: Tensor | None,
) -> nn.Module | None:
    """Return the module that takes the place of ``module`` and computes with ``form``. First
    answer. ``module`` is on the meta device. Not called when the sink is a checkpoint."""


# --- Stage 7: post-quantization set-up ---------------------------------------------------------


@hookspec
def quantmill_finalize(job: Job, model: nn.Module) -> Iterable[Finding] | None:
    """Finish the live model: config update, hooks, trainable parameters. All answers."""


# --- Observation -------------------------------------------------------------------------------


@hookspec
def quantmill_stage_started(job: Job, stage: str) -> None:
    """A stage begins: ``configure``, ``select``, ``validate``, ``target``, ``quantize``,
    ``replace`` or ``finalize``."""


@hookspec
def quantmill_stage_finished(job: Job, stage: str, seconds: float) -> None:
    """A stage ended without an exception, after ``seconds`` of wall time."""


@hookspec
def quantmill_progress(job: Job, done: int, total: int, what: str) -> None:
    """Work advances: ``done`` of ``total`` bytes, and the module at hand."""
