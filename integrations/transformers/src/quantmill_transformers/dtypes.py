"""Which dtype transformers gives each parameter, and which modules it keeps from quantizers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.job import Job

from quantmill.targeting.types import Rule

__all__ = ["DtypePolicy", "kept_rules"]


def _keys(model: Any, name: str) -> list[str]:
    value = getattr(model, name, None)
    return sorted(value) if isinstance(value, list | tuple | set | frozenset) else []


class DtypePolicy:
    """The library's rule: the model's dtype, but fp32 where a class asks for it, and a dtype that
    a class gave a parameter explicitly stays."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        keys: set[str] = set()
        if dtype == torch.float16:
            keys |= set(_keys(model, "_keep_in_fp32_modules"))
        if dtype in (torch.float16, torch.bfloat16):
            keys |= set(_keys(model, "_keep_in_fp32_modules_strict"))
        body = "|".join(key.replace("*", ".*") for key in sorted(keys))
        self._fp32 = re.compile(body) if body else None

    def of(self, name: str, meta: Tensor) -> torch.dtype:
        """The dtype of a parameter or buffer, ``meta`` being the one the class made."""
        if not meta.is_floating_point():
            return meta.dtype
        if self._fp32 is not None and self._fp32.search(name):
            return torch.float32
        return meta.dtype


def kept_rules(job: Job) -> Iterable[Rule]:
    """Modules in ``_keep_in_fp32_modules`` (T5's ``wo``) are kept from quantizers in any dtype, as
    transformers' own quantizers do; only in float16 they are fp32 as well."""
    from quantmill_transformers.architecture import TransformersArchitecture

    architecture = job.architecture
    if not isinstance(architecture, TransformersArchitecture):
        return []
    fresh = {name.rpartition(".")[0] for name in architecture.fresh}
    return [
        *_skips(_keys(architecture.skeleton, "_keep_in_fp32_modules")),
        *(
            Rule(name, "skip", "architecture", reason="its weight was made anew", optional=True)
            for name in sorted(fresh - {""})
        ),
    ]


def _skips(keys: Sequence[str]) -> list[Rule]:
    # From the start of a name to a component's end, or as the end of a name.
    return [
        Rule(
            rf"re:(?:{key})(?:\..*)?|.*(?:{key})",
            "skip",
            "architecture",
            reason="the architecture keeps it from quantizers",
            optional=True,
        )
        for key in keys
    ]
