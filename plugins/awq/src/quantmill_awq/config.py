"""The configuration of the AWQ backend, with the field names of AutoAWQ and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from quantmill.config import GroupSize, MethodConfig
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule

__all__ = ["AwqConfig", "rules"]

_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
_UNUSED = (
    "backend",
    "batch_size",
    "checkpoint_format",
    "desc_act",
    "do_fuse",
    "dynamic",
    "exllama_config",
    "format",
    "fuse_max_seq_len",
    "lm_head",
    "modules_to_fuse",
    "pack_dtype",
    "sym",
)
"""Fields of peers that have no say in this layout; the ones a checkpoint brings are kept."""

_KERNELS = ("exllama", "ipex")
"""Kernels that transformers names in place of the layout that they read, GEMM."""
_INTERLEAVED = ("gemv_fast", "llm-awq")


class AwqConfig(MethodConfig):
    """What AWQ can be told; names and defaults are those of AutoAWQ."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"version", "grid", "clip"})

    bits: Literal[4] = 4
    group_size: GroupSize = 128
    """Input columns that share a scale; -1 for one group per row."""
    zero_point: bool = True
    """Asymmetric; otherwise the zero point is the middle code."""
    version: Literal["gemm", "gemv"] = "gemm"
    """Layout on disk. Both are read; gemm is written."""
    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""
    grid: int = Field(20, ge=1, le=200, exclude=True)
    """Exponents tried between 0 and 1 for the scales."""
    clip: bool = Field(True, exclude=True)
    """Search for ranges smaller than the full one."""
    meta: dict[str, Any] | None = None
    """What the writer noted about itself; kept."""

    @field_validator("version", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        name = value.lower() if isinstance(value, str) else value
        if name in _KERNELS:
            return "gemm"
        if name in _INTERLEAVED:
            raise ValueError(
                "its words are interleaved for one kernel, and gemm and gemv are read: get the"
                " checkpoint in one of these"
            )
        return name

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        for old, new in _ALIASES.items():
            if old in data:
                data.setdefault(new, data.pop(old))
        written = data.get("format") or data.get("checkpoint_format")
        if isinstance(written, str) and written.lower() in ("gemm", "gemv", *_INTERLEAVED):
            data.setdefault("version", written.lower())
        for name in _UNUSED:
            data.pop(name, None)
        if data.get("modules_to_not_convert") == []:
            data["modules_to_not_convert"] = None
        return data

    def to_checkpoint(self) -> dict[str, Any]:
        data = super().to_checkpoint()
        for name in ("modules_to_not_convert", "meta"):
            if data.get(name) is None:
                data.pop(name, None)
        # GPTQModel reads AWQ too and asks for its own words.
        extra = {"quant_method": "awq", "method": "awq", "format": self.version}
        return {**data, **extra, "checkpoint_format": self.version, "sym": not self.zero_point}

    def extra_files(self, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": dict(stored)}

    def keeping(self, modules: Sequence[str]) -> AwqConfig:
        names = sorted({*(self.modules_to_not_convert or []), *modules})
        return self.model_copy(update={"modules_to_not_convert": names or None})

    def summary(self) -> str:
        size = "per row" if self.group_size == -1 else f"groups of {self.group_size}"
        kind = "asymmetric" if self.zero_point else "symmetric"
        return f"{self.bits} bits, {size}, {kind}, {self.version}"


def rules(config: AwqConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules; the defaults stay in force beside it."""
    return from_transformers_skip(config.modules_to_not_convert or [], origin)
