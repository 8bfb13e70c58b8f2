"""Mixes: which types a model gets when it is asked for ``Q4_K_M``, and what else can be asked.

A mix is a type for most matrices and a few better ones where errors cost most: see
:mod:`quantmill_gguf.tensor_types`. This module imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from quantmill.config import suggestion
from quantmill.findings import QuantmillError
from quantmill.targeting.types import ModuleInfo
from quantmill_gguf import codes
from quantmill_gguf.container import Array

__all__ = ["MIXES", "NEEDY", "Mix", "MixOptions", "ModelFacts", "mix_named"]


@dataclass(frozen=True, slots=True)
class Mix:
    """A named mix."""

    name: str
    base: str
    """Type of what no rule speaks of."""
    file_type: int
    """``general.file_type`` of a file of this mix."""


MIXES: Final[dict[str, Mix]] = {
    item.name: item
    for item in (
        Mix("F32", "F32", 0),
        Mix("F16", "F16", 1),
        Mix("BF16", "BF16", 32),
        Mix("Q4_0", "Q4_0", 2),
        Mix("Q4_1", "Q4_1", 3),
        Mix("Q5_0", "Q5_0", 8),
        Mix("Q5_1", "Q5_1", 9),
        Mix("Q8_0", "Q8_0", 7),
        Mix("Q2_K", "Q2_K", 10),
        Mix("Q2_K_S", "Q2_K", 21),
        Mix("Q3_K_S", "Q3_K", 11),
        Mix("Q3_K_M", "Q3_K", 12),
        Mix("Q3_K_L", "Q3_K", 13),
        Mix("Q4_K_S", "Q4_K", 14),
        Mix("Q4_K_M", "Q4_K", 15),
        Mix("Q5_K_S", "Q5_K", 16),
        Mix("Q5_K_M", "Q5_K", 17),
        Mix("Q6_K", "Q6_K", 18),
        Mix("IQ4_NL", "IQ4_NL", 25),
        Mix("IQ4_XS", "IQ4_XS", 30),
        Mix("TQ1_0", "TQ1_0", 36),
        Mix("TQ2_0", "TQ2_0", 37),
        Mix("MXFP4_MOE", "MXFP4", 38),
        Mix("Q1_0", "Q1_0", 40),
        Mix("Q2_0", "Q2_0", 41),
    )
}
NEEDY: Final = ("Q2_K_S",)
"""Mixes that llama-quantize makes with an importance matrix only."""
_ALIASES: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def mix_named(name: str) -> Mix:
    """The mix of that name, in any case; ``Q4_K`` means ``Q4_K_M``.

    Raises:
        QuantmillError: ``QM-GGUF-031``, there is none.
    """
    upper = name.upper()
    found = MIXES.get(_ALIASES.get(upper, upper))
    if found is None:
        hint = suggestion(upper, MIXES) or f"use one of {', '.join(MIXES)}"
        raise QuantmillError(codes.UNKNOWN_MIX(name, f"{name!r} is no mix", hint))
    return found


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the choices depend on besides names and shapes."""

    architecture: str
    """``general.architecture``."""
    layers: int
    heads: int = 0
    kv_heads: int = 0
    experts: int = 0

    @property
    def sharing(self) -> int:
        """Query heads for each head of keys and values, of the first layer."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """The size at which llama.cpp gives the values more bits."""
        known = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
        grouped = self.architecture != "llama" or self.heads != self.kv_heads
        return known.get(self.architecture) == self.layers and grouped

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> ModelFacts:
        """From a file's metadata; what is missing or odd counts as 0."""
        name = metadata.get("general.architecture")
        name = name if isinstance(name, str) else ""

        def number(key: str, default: int = 0) -> int:
            value = metadata.get(f"{name}.{key}", default)
            if isinstance(value, Array | list | tuple):
                value = next(iter(value), default)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            return value if good else default

        heads = number("attention.head_count")
        return cls(
            architecture=name,
            layers=number("block_count"),
            heads=heads,
            kv_heads=number("attention.head_count_kv", heads),
            experts=number("expert_count"),
        )


@dataclass(frozen=True, slots=True)
class MixOptions:
    """What a user may ask for besides the mix."""

    importance: bool = False
    """An importance matrix is used: some mixes are then more daring."""
    output: str | None = None
    """Type of the output head (and of an embedding that is also the head)."""
    embedding: str | None = None
    """Type of the token embedding."""
    overrides: Sequence[tuple[str, str]] = ()
    """``(pattern, type)`` in the pattern language of targeting, the most specific one wins. They
    match the tensors' names without ``.weight`` and the names in ``aliases``."""
    aliases: Mapping[str, ModuleInfo] = field(default_factory=dict)
    """Tensor name to its module in the model it was exported from."""
    pure: bool = False
    """The base type for all."""
    keep_output: bool = False
    """The output head is not quantized."""
