"""Registrations of the transformers integration. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import HOOK_API_VERSION, hookimpl
from quantmill.registrations import ModelSource, Requirement

QUANTMILL_API = HOOK_API_VERSION

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
            open="quantmill_transformers.architecture:open_folder",
            requirements=(TRANSFORMERS,),
            priority=10,
            tokenizer="quantmill_transformers.tokenizer:load_tokenizer",
        )
    ]
