"""What the plugin is asked about every model. diffusers takes seconds to import, so that it is
left alone until a model is seen to be of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmill.architecture import Architecture
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.job import Job
    from quantmill.targeting.types import Rule

__all__ = ["kept_rules", "mark_model", "open_folder"]


def open_folder(headers: CheckpointHeaders) -> Architecture | str | None:
    """The architecture a component's config names; a string says why it is none of ours."""
    if not isinstance(headers.config.get("_class_name"), str):
        return None
    from quantmill_diffusers.architecture import open_component

    return open_component(headers)


def kept_rules(job: Job) -> Iterable[Rule]:
    """Modules that the class keeps in fp32 are kept from quantizers, as diffusers' own do."""
    if not _is_ours(job):
        return []
    from quantmill_diffusers.architecture import rules_of

    return rules_of(job.architecture)


def mark_model(job: Job, model: Any) -> None:
    """Let diffusers see that ``model`` is quantized."""
    if _is_ours(job):
        from quantmill_diffusers.quantizer import mark

        mark(job, model)


def _is_ours(job: Job) -> bool:
    architecture = job.architecture
    return architecture is not None and architecture.source_name == "diffusers"
