"""The configuration of the GGUF backend: the type to quantize to, and what a file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError
from quantmill.targeting.types import Rule
from quantmill_gguf.mixes import mix_named
from quantmill_gguf.tensor_types import fallback

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


_DEFAULT = "Q8_0"


class GgufConfig(MethodConfig):
    """What can be asked for, and what stands in a file's header."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {"mix", "type", "output_type", "embedding_type", "imatrix", "pre_tokenizer"}
    )

    mix: str | None = None
    """A mix of llama.cpp's, such as ``Q4_K_M``: a type for most weights, better ones for some."""
    type: TypeName | None = None
    """ggml's name of the one type that weights are quantized to, without a mix's choices and
    fallbacks. A stored tensor says its own."""
    output_type: TypeName | None = None
    """Of the output head, and of an embedding that serves as one; a mix's choice without it."""
    embedding_type: TypeName | None = None
    """Of the token embedding."""
    imatrix: str | None = None
    """Path of an importance matrix, as llama.cpp writes it."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer, where it can't be told from tokenizer.json."""
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
        for key in ("type", "output_type", "embedding_type"):
            if isinstance(data.get(key), str):
                data[key] = data[key].upper()
        return data

    @field_validator("mix")
    @classmethod
    def _known_mix(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return mix_named(value).name
        except QuantmillError as error:
            finding = error.findings[0]
            raise ValueError(f"{finding.cause}; {finding.fix}") from None

    def type_for(self, columns: int) -> str:
        """The type of a weight with rows of ``columns``, where no rule says another one."""
        if self.type is not None or self.mix is None:
            return self.type or _DEFAULT
        return fallback(mix_named(self.mix).base, columns)

    def to_checkpoint(self) -> dict[str, Any]:
        return {"quant_method": "gguf", **super().to_checkpoint()}

    def summary(self) -> str:
        if self.types:
            return ", ".join(f"{name} x{count}" for name, count in self.types.items())
        return self.mix if self.mix is not None and self.type is None else self.type or _DEFAULT


def rules(config: GgufConfig, origin: str) -> list[Rule]:
    """The head is quantized in most files: nothing to be surprised about."""
    if origin != "checkpoint":
        return []
    return [Rule("lm_head", "include", origin, reason="the file decides", optional=True)]
