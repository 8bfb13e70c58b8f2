"""What a quantized module knows of where it comes from: enough to make it anew.

Frameworks that work on modules one by one (adapters, offloading) find it as the attribute
``quantmill_origin`` of any module that a job put in place, whichever backend made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantmill.stages.quantize import factory_of, quantizer_of

if TYPE_CHECKING:
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.targeting.types import Target

__all__ = ["Origin", "origin_of"]

_ATTRIBUTE = "quantmill_origin"


class _InMemory:
    """A weight source over a matrix that is there."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.shape, self.dtype = name, tuple(weight.shape), weight.dtype
        self._weight = weight

    def tensor(self) -> Tensor:
        return self._weight

    def row_blocks(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        yield 0, self._weight


@dataclass(frozen=True, slots=True)
class Origin:
    """The job, the method with its config, and the target of a module."""

    job: Job
    selection: Selection
    target: Target

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def mark(self, module: nn.Module) -> None:
        """Leave word at ``module``."""
        setattr(module, _ATTRIBUTE, self)

    def form_of(self, module: nn.Module) -> Form | None:
        """The exact form that ``module`` computes with."""
        return factory_of(self.job, self.selection).form_of(module)

    def quantize(self, weight: Tensor) -> Form:
        """A form of another float weight ``[out, in]`` for the same target.

        Raises:
            NonFiniteWeight: the weight holds NaN or infinity.
            QuantmillError: the weight can't be quantized for another reason, naming it.
        """
        source = _InMemory(self.target.weight_name, weight)
        return quantizer_of(self.job, self.selection).quantize(self.target, source)

    def build(self, form: Form, bias: Tensor | None) -> nn.Module:
        """The method's module for ``form``, with the same word left at it."""
        assert self.job.plan is not None
        dtype = getattr(torch, self.job.plan.dtype)
        module = factory_of(self.job, self.selection).build(self.target, form, bias, dtype)
        self.mark(module)
        return module


def origin_of(module: nn.Module) -> Origin | None:
    """The word that a job left at ``module``; None for a module that no job made."""
    found = getattr(module, _ATTRIBUTE, None)
    return found if isinstance(found, Origin) else None
