"""Registrations of the diffusers integration. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantmill.hookspecs import hookimpl
from quantmill.registrations import Finalizer, ModelSource, Requirement, resolve

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill.targeting.types import Rule

QUANTMILL_API = 1

DIFFUSERS = Requirement("diffusers", ">=0.36,<1", "builds the components of pipelines")


@hookimpl
def quantmill_requirements() -> Sequence[Requirement]:
    return [DIFFUSERS]


@hookimpl
def quantmill_model_sources() -> Sequence[ModelSource]:
    return [
        ModelSource(
            name="diffusers",
            summary="Components of Hugging Face Diffusers' pipelines, from config.json",
            open="quantmill_diffusers.sources:open_folder",
            requirements=(DIFFUSERS,),
            priority=5,
        )
    ]


@hookimpl
def quantmill_finalizers() -> Sequence[Finalizer]:
    return [Finalizer("diffusers", "quantmill_diffusers.sources:mark_model")]


@hookimpl
def quantmill_target(job: Job) -> Iterable[Rule]:
    rules: Iterable[Rule] = resolve("quantmill_diffusers.sources:kept_rules")(job)
    return rules
