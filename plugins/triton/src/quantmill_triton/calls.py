"""From the registry's arguments to the operators'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantmill.forms import Affine
from quantmill_triton.layout import facts_of

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.forms import Form

__all__ = ["arguments"]

_NAMES = ("codes", "high", "scale", "offset", "table", "lut", "unit", "order")


def arguments(
    tensors: Mapping[str, Tensor], skeleton: Form
) -> tuple[list[Tensor | None], list[int], float]:
    """Tensors, facts and factor of a prepared form, as the operators take them."""
    facts = facts_of(skeleton, tensors)
    assert facts is not None
    found: list[Any] = [tensors.get(name) for name in _NAMES]
    if "pairs" in tensors:
        found[2] = tensors["pairs"]
    return found, list(facts), skeleton.factor if isinstance(skeleton, Affine) else 1.0
