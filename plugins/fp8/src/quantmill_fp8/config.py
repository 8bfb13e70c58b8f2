"""The configurations of the FP8 backend, with the field names of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator

from quantmill.config import MethodConfig
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule

__all__ = ["FbgemmFp8Config", "Fp8Config", "SkipConfig", "rules"]


class SkipConfig(MethodConfig):
    """What both dialects share: a list of modules to keep float."""

    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""

    def to_checkpoint(self) -> dict[str, Any]:
        data = super().to_checkpoint()
        if data.get("modules_to_not_convert") is None:
            data.pop("modules_to_not_convert", None)
        return data

    def keeping(self, modules: Sequence[str]) -> Self:
        names = sorted({*(self.modules_to_not_convert or []), *modules})
        return self.model_copy(update={"modules_to_not_convert": names or None})


class Fp8Config(SkipConfig):
    """Fine-grained FP8 as DeepSeek-V3 introduced it (arXiv 2412.19437, 3.3) and transformers reads
    it."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"dequantize"})

    fmt: Literal["e4m3"] = "e4m3"
    """Format of the values."""
    weight_block_size: tuple[PositiveInt, PositiveInt] | None = (128, 128)
    """Rows and columns that share a scale; None for one scale per weight."""
    scale_fmt: Literal["float", "ue8m0"] = "float"
    """Scales are float32 numbers, or powers of two of one byte. What a checkpoint really holds its
    tensors say: DeepSeek-V3.1 has ``ue8m0`` in its config and powers of two in float32."""
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    """How activations are rounded to 8 bits, on devices that multiply in 8 bits."""
    expert_dtype: Literal["fp8"] = "fp8"
    """Experts of 4 bits are not read."""
    modules_to_convert: list[str] | None = Field(None, max_length=0)
    """Embeddings in FP8 are not read: no name may be in it."""
    dequantize: bool = Field(False, exclude=True)
    """transformers' switch; here ``load(..., dequantize=True)`` does it, and a finding says so."""

    @field_validator("activation_scheme", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        if raw.get("quant_method") == "mxfp8":
            # transformers' name for these two: 32 columns share a power of two.
            data = {"weight_block_size": [1, 32], "scale_fmt": "ue8m0", **data}
        ignored = data.pop("ignored_layers", None)
        if ignored is not None and data.get("modules_to_not_convert") is None:
            # MiniMax names the list so, and transformers takes it.
            data["modules_to_not_convert"] = ignored
        return data

    def to_checkpoint(self) -> dict[str, Any]:
        data = super().to_checkpoint()
        if data.get("modules_to_convert") is None:
            data.pop("modules_to_convert", None)
        return {"quant_method": "fp8", **data}

    def summary(self) -> str:
        size = self.weight_block_size
        kind = "per tensor" if size is None else f"blocks of {size[0]} x {size[1]}"
        return f"E4M3, {kind}, {self.scale_fmt} scales"


class FbgemmFp8Config(SkipConfig):
    """FBGEMM's row-wise FP8, as transformers reads it."""

    activation_scale_ub: float = Field(1200.0, gt=0)
    """The largest magnitude that activations are scaled for, on devices that multiply in 8 bits."""

    def to_checkpoint(self) -> dict[str, Any]:
        return {"quant_method": "fbgemm_fp8", **super().to_checkpoint()}

    def summary(self) -> str:
        return "E4M3, one scale per row"


def rules(config: SkipConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules; the defaults stay in force beside it."""
    return from_transformers_skip(config.modules_to_not_convert or [], origin)
