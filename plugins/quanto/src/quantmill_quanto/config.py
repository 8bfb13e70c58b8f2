"""The configuration of the Quanto backend, with the field names of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from quantmill.config import MethodConfig
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule

__all__ = [
    "FLOATS",
    "QMAP",
    "QuantoConfig",
    "Weights",
    "is_active",
    "is_plain",
    "plain",
    "qtype",
    "rules",
]

Weights = Literal["int8", "int4", "int2", "float8", "float8_e5m2", "float8_e4m3fnuz"]
FLOATS = {
    "float8": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
}
"""Types of 8-bit floats to PyTorch's data type."""
QMAP = "quanto_qmap.json"
"""Optimum-quanto's map: module to the types of its weights and activations."""


class QuantoConfig(MethodConfig):
    """What Quanto can be told; names and defaults are those of transformers' ``QuantoConfig``."""

    weights: Weights = "int8"
    """``int8`` and the kinds of ``float8`` (E4M3 if nothing more is said) have a scale per row;
    ``int4`` and ``int2`` one per group of 128 columns (or fewer, to divide the row), with a
    shift."""
    activations: Literal["int8", "float8", "float8_e5m2", "float8_e4m3fnuz"] | None = None
    """8-bit inputs and outputs of the linears, by stored scales: read, and made by the method
    ``quanto-activations``, which calibrates."""
    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""
    mixed: list[Weights] | None = None
    """Other types of weights that a map of optimum-quanto gives some modules."""
    quantized: tuple[str, ...] = Field((), exclude=True, repr=False)
    """Set while a checkpoint is written: the modules that its map will name."""

    @field_validator("weights", "activations", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return plain(value)

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return _bits(self.weights)

    @property
    def top(self) -> float:
        """The largest code of activations."""
        kind = FLOATS.get(self.activations or "")
        if kind is None:
            return 127.0
        import torch

        return float(torch.finfo(getattr(torch, kind)).max)

    @property
    def packed_bits(self) -> list[int]:
        """Fewer than 8 bits that modules may have."""
        found = [_bits(name) for name in (self.weights, *(self.mixed or []))]
        return [bits for bits in found if bits < 8]

    @classmethod
    def field_names(cls) -> list[str]:
        return [name for name in super().field_names() if name != "quantized"]

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        if data.get("modules_to_not_convert") == []:
            data["modules_to_not_convert"] = None
        return data

    def to_checkpoint(self) -> dict[str, Any]:
        data = {**super().to_checkpoint(), "quant_method": "quanto"}
        if self.mixed is None:
            del data["mixed"]
        return data

    def extra_files(self, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        entry = {"weights": qtype(self.weights), "activations": qtype(self.activations)}
        return {QMAP: dict.fromkeys(self.quantized, entry)} if self.quantized else {}

    def keeping(self, modules: Sequence[str]) -> QuantoConfig:
        names = sorted({*(self.modules_to_not_convert or []), *modules})
        return self.model_copy(update={"modules_to_not_convert": names or None})

    def summary(self) -> str:
        inputs = f", {self.activations} activations" if self.activations else ""
        return f"{self.weights} weights{inputs}"


def is_active(raw: Mapping[str, Any]) -> bool:
    """Whether a config asks for quantized activations."""
    return plain(raw.get("activations")) is not None


def is_plain(raw: Mapping[str, Any]) -> bool:
    """Whether it asks for weights only."""
    return not is_active(raw)


def _bits(weights: str) -> int:
    return int(weights.partition("_")[0].removeprefix("float").removeprefix("int"))


def plain(name: Any) -> Any:
    """Transformers' name of a type that optimum-quanto calls ``name``."""
    if not isinstance(name, str):
        return name
    if name == "none":
        return None
    short = name.removeprefix("q")
    return "float8" if short == "float8_e4m3fn" else short


def qtype(name: str | None) -> str:
    """Optimum-quanto's name of a type: the inverse."""
    return "none" if name is None else f"q{FLOATS.get(name, name)}"


def rules(config: QuantoConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules; the defaults stay in force beside it."""
    return from_transformers_skip(config.modules_to_not_convert or [], origin)
