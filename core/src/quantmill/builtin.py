"""The core as a plugin: stage implementations that run last and delegate to the registrations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantmill.hookspecs import HOOK_API_VERSION, hookimpl
from quantmill.registrations import resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantmill.backend import WeightSource
    from quantmill.config import MethodConfig
    from quantmill.findings import Finding
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.targeting.types import Rule, Target

QUANTMILL_API = HOOK_API_VERSION


@hookimpl(trylast=True)
def quantmill_configure(
    job: Job, raw: Mapping[str, Any], origin: str
) -> tuple[str, MethodConfig] | None:
    from quantmill.stages.configure import read_config

    return read_config(job, raw, origin)


@hookimpl(trylast=True)
def quantmill_validate(job: Job) -> Iterable[Finding]:
    from quantmill.stages.validate import core_findings

    return core_findings(job)


@hookimpl(trylast=True)
def quantmill_target(job: Job) -> Iterable[Rule]:
    from quantmill.stages.target import core_rules

    return core_rules(job)


@hookimpl(trylast=True)
def quantmill_quantize(
    job: Job, selection: Selection, target: Target, weight: WeightSource
) -> Form | None:
    from quantmill.stages.quantize import quantizer_of

    form: Form = quantizer_of(job, selection).quantize(target, weight)
    return form


@hookimpl(trylast=True)
def quantmill_replace(
    job: Job,
    selection: Selection,
    target: Target,
    module: nn.Module,
    form: Form,
    bias: Tensor | None,
) -> nn.Module | None:
    from quantmill.stages.replace import embedding_for, linear_for

    new = linear_for(job, selection, target, form, bias)
    if new is None and target.kind == "embedding":
        return embedding_for(job, selection, module, form)
    return new


@hookimpl(trylast=True)
def quantmill_finalize(job: Job, model: nn.Module) -> Iterable[Finding] | None:
    from quantmill.stages.finalize import core_finalize

    found = list(core_finalize(job, model))
    used = {selection.method.name for selection in job.selections.values()}
    for finalizer in job.host.finalizers:
        if not finalizer.methods or used & set(finalizer.methods):
            found.extend(resolve(finalizer.finalize)(job, model) or ())
    return found
