"""The configuration of the GGUF backend: the type to quantize to, and what a file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from quantmill.config import MethodConfig
from quantmill.targeting.types import Rule

__all__ = ["GgufConfig", "rules"]

TypeName = Literal[
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "TQ1_0",
    "TQ2_0",
    "Q1_0",
    "Q2_0",
]


class GgufConfig(MethodConfig):
    """What can be asked for, and what stands in a file's header."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"type"})

    type: TypeName = "Q8_0"
    """ggml's name of the type that weights are quantized to. A stored tensor says its own."""
    version: int | None = None
    """Of the file that was read."""
    byte_order: Literal["little", "big"] = "little"
    types: dict[str, int] = Field(default_factory=dict)
    """Types in the file, and how many tensors have each."""
    bits_per_weight: float | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    """The file's metadata, also read from keys with dots; long arrays as their length."""

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        # A file's own keys have dots in them, and stand beside ours.
        own = {key: data.pop(key) for key in list(data) if "." in key}
        if own:
            data["metadata"] = {**data.get("metadata", {}), **own}
        name = data.get("type")
        if isinstance(name, str):
            data["type"] = name.upper()
        return data

    def to_checkpoint(self) -> dict[str, Any]:
        return {"quant_method": "gguf", **super().to_checkpoint()}

    def summary(self) -> str:
        if self.types:
            return ", ".join(f"{name} x{count}" for name, count in self.types.items())
        return self.type


def rules(config: GgufConfig, origin: str) -> list[Rule]:
    """The head is quantized in most files: nothing to be surprised about."""
    if origin != "checkpoint":
        return []
    return [Rule("lm_head", "include", origin, reason="the file decides", optional=True)]
