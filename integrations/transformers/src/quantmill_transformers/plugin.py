"""Registrations of the transformers integration. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    ConfigReader,
    Finalizer,
    ModelSource,
    Requirement,
    Validator,
    resolve,
)
from quantmill_transformers.registry import REFUSED

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill.targeting.types import Rule

QUANTMILL_API = 1

TRANSFORMERS = Requirement("transformers", ">=5.0,<6", "builds the architecture")


@hookimpl
def quantmill_requirements() -> Sequence[Requirement]:
    return [TRANSFORMERS]


@hookimpl
def quantmill_model_sources() -> Sequence[ModelSource]:
    return [
        ModelSource(
            name="transformers",
            summary="Architectures of Hugging Face Transformers, from config.json",
            open="quantmill_transformers.start:open_folder",
            requirements=(TRANSFORMERS,),
            priority=10,
            tokenizer="quantmill_transformers.tokenizer:load_tokenizer",
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(f"transformers-{key}", (key,), method="", refusal=reason)
        for key, reason in REFUSED.items()
    ]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("transformers", "quantmill_transformers.validate:check")]


@hookimpl
def quantmill_finalizers() -> Sequence[Finalizer]:
    return [Finalizer("transformers", "quantmill_transformers.quantizer:mark_model")]


@hookimpl
def quantmill_target(job: Job) -> Iterable[Rule]:
    rules: Iterable[Rule] = resolve("quantmill_transformers.dtypes:kept_rules")(job)
    return rules
