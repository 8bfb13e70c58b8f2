"""The configuration of the bitsandbytes backend, with the peers' field names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from quantmill.config import EXCLUSIVE, MethodConfig, dtype_name
from quantmill.findings import Finding
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule

__all__ = ["BLOCK_SIZES", "STORAGES", "BnbConfig", "skip_rules"]

Storage = Literal["uint8", "int8", "float16", "bfloat16", "float32"]
STORAGES: tuple[str, ...] = get_args(Storage)
"""Dtypes as which the bytes of 4-bit weights may be viewed (FSDP shards floats only)."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights per scale that the library's kernels know."""
Compute = Literal["float32", "bfloat16", "float16"]


class BnbConfig(MethodConfig):
    """What bitsandbytes can be told; names and defaults are those of ``BitsAndBytesConfig``."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "bnb_4bit_compute_dtype",
            "llm_int8_threshold",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
        }
    )
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("load_in_4bit", "load_in_8bit"),)

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    llm_int8_threshold: float = Field(6.0, ge=0.0)
    """Activations at least this large are computed in 16 bits; 0 turns that off."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Compute = "float32"
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Storage = "uint8"
    bnb_4bit_blocksize: int = Field(64, exclude=True)
    """Weights per scale. Not part of the peers' config: a checkpoint tells it per tensor."""

    @field_validator("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)

    @field_validator("bnb_4bit_blocksize")
    @classmethod
    def _block(cls, value: int) -> int:
        if value not in BLOCK_SIZES:
            raise ValueError("a block size is a power of two from 32 to 4096")
        return value

    @model_validator(mode="after")
    def _something(self) -> BnbConfig:
        if not self.load_in_4bit and not self.load_in_8bit:
            raise ValueError("nothing is set: either load_in_4bit or load_in_8bit must be true")
        return self

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        for name in ("load_in_4bit", "load_in_8bit"):
            private = data.pop(f"_{name}", None)  # what BitsAndBytesConfig.to_dict writes as well
            if private is not None:
                data.setdefault(name, private)
        if data.get("llm_int8_skip_modules") == []:
            data["llm_int8_skip_modules"] = None
        return data

    @classmethod
    def from_checkpoint(cls, raw: Mapping[str, Any]) -> tuple[Self, list[Finding]]:
        # transformers takes and writes this flag beside load_in_8bit, where it does nothing: no
        # reason to refuse what they read. It is kept, so that the config is written as it was.
        idle = cls._is_8bit(cls.normalise(raw)) and raw.get("bnb_4bit_use_double_quant") is True
        if not idle:
            return super().from_checkpoint(raw)
        config, findings = super().from_checkpoint({**raw, "bnb_4bit_use_double_quant": False})
        return config.model_copy(update={"bnb_4bit_use_double_quant": True}), findings

    @staticmethod
    def _is_8bit(data: Mapping[str, Any]) -> bool:
        return bool(data.get("load_in_8bit")) and not data.get("load_in_4bit")

    @classmethod
    def exclusive_findings(cls, raw: Mapping[str, Any]) -> list[Finding]:
        found = super().exclusive_findings(raw)
        name = "bnb_4bit_use_double_quant"
        if cls._is_8bit(raw) and raw.get(name):
            found.append(
                EXCLUSIVE(name, f"{name} has no meaning with load_in_8bit", f"leave {name} out")
            )
        return found

    def to_checkpoint(self) -> dict[str, Any]:
        data = super().to_checkpoint()
        data["_load_in_4bit"] = self.load_in_4bit
        data["_load_in_8bit"] = self.load_in_8bit
        data["quant_method"] = "bitsandbytes"
        return dict(sorted(data.items()))

    def keeping(self, modules: Sequence[str]) -> BnbConfig:
        names = sorted({*(self.llm_int8_skip_modules or []), *modules})
        return self.model_copy(update={"llm_int8_skip_modules": names or None})

    def summary(self) -> str:
        if self.load_in_8bit:
            return "LLM.int8"
        nested = ", double quantization" if self.bnb_4bit_use_double_quant else ""
        return f"{self.bnb_4bit_quant_type.upper()}, blocks of {self.bnb_4bit_blocksize}{nested}"


def skip_rules(config: BnbConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules; the defaults stay in force beside it."""
    return from_transformers_skip(config.llm_int8_skip_modules or [], origin)
