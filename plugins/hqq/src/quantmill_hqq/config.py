"""The configuration of the HQQ backend, with the field names of hqq and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from quantmill.config import MethodConfig
from quantmill.targeting.dialects import from_hqq_dynamic
from quantmill.targeting.types import Rule

__all__ = ["HqqConfig", "rules"]

_PARAMETERS = "weight_quant_params"
_NESTED = {"scale_quant_params": "quant_scale", "zero_quant_params": "quant_zero"}
_DERIVED = ("round_zero", "offload_meta")
"""What follows from other fields or says where hqq computes: accepted, unused."""


class HqqConfig(MethodConfig):
    """What HQQ can be told; names and defaults are those of transformers' ``HqqConfig``."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"iters", "lp_norm"})

    nbits: Literal[1, 2, 3, 4, 8] = 4
    group_size: int | None = 64
    """Weights that share a scale, a multiple of 8; None for a whole row (axis 1) or column."""
    axis: Literal[0, 1] = 1
    """1: groups of consecutive weights; 0: of weights that lie ``numel / group_size`` apart."""
    optimize: bool = True
    """Search zero points; else round to nearest over each group's range."""
    iters: int = Field(20, ge=1, le=1000)
    """Most iterations of the search."""
    lp_norm: float = Field(0.7, gt=0, le=1)
    """Exponent of the error that the search minimises."""
    channel_wise: Literal[True] = True
    view_as_float: Literal[False] = False
    """hqq can store codes as if they were floats, for distributed training: read, not made."""
    quant_scale: Literal[False] = False
    quant_zero: Literal[False] = False
    """Early versions of hqq could quantize scales and zero points; such files are not read."""
    dynamic_config: dict[str, dict[str, Any]] | None = None
    """End of a module's name (``self_attn.q_proj``) to its fields; others stay float."""
    skip_modules: list[str] | None = None
    """Modules to keep float, in addition to the defaults: names or ends of them."""

    @field_validator("group_size")
    @classmethod
    def _size(cls, value: int | None) -> int | None:
        if value is not None and (value < 8 or value % 8):
            raise ValueError("group_size is a multiple of 8, or none for one group per row")
        return value

    @field_validator("dynamic_config")
    @classmethod
    def _dynamic(cls, value: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for tag, options in (value or {}).items():
            stray = set(options) - (set(cls.model_fields) - {"dynamic_config", "skip_modules"})
            if stray:
                raise ValueError(f"{tag!r} sets unknown fields {sorted(stray)}")
        return value

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        stored = data.pop("quant_config", None)
        if isinstance(stored, Mapping) and _PARAMETERS in stored:
            data = {**_stored(stored), **data}
        elif isinstance(stored, Mapping):
            data["dynamic_config"] = {tag: _stored(item) for tag, item in stored.items()}
        elif stored is not None:
            data["dynamic_config"] = stored  # no mapping: validation says so
        dynamic = data.get("dynamic_config")
        if isinstance(dynamic, Mapping):
            data["dynamic_config"] = {tag: _flat(item) for tag, item in dynamic.items()}
        if data.get("axis", 0) is None:
            del data["axis"]
        if data.get("skip_modules") == []:
            data["skip_modules"] = None
        for name in _DERIVED:
            data.pop(name, None)
        return data

    def to_checkpoint(self) -> dict[str, Any]:
        if self.dynamic_config:
            # As transformers does it: what is not named here stays float there.
            stored = {
                tag: self.model_copy(update=options)._parameters()
                for tag, options in self.dynamic_config.items()
            }
        else:
            stored = self._parameters()
        return {
            "quant_method": "hqq",
            "quant_config": stored,
            "skip_modules": list(self.skip_modules or []),
            **self.unknown,
        }

    def _parameters(self) -> dict[str, Any]:
        """The ``BaseQuantizeConfig`` of hqq."""
        return {
            _PARAMETERS: {
                "nbits": self.nbits,
                "channel_wise": True,
                "group_size": self.group_size,
                "optimize": self.optimize,
                "round_zero": self.nbits == 4,
                "axis": self.axis,
                "view_as_float": False,
            },
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        }

    def keeping(self, modules: Sequence[str]) -> HqqConfig:
        names = sorted({*(self.skip_modules or []), *modules})
        return self.model_copy(update={"skip_modules": names or None})

    def joined(self, others: Mapping[str, HqqConfig]) -> dict[str, Any] | None:
        # Only ``dynamic_config`` says more than one thing: it made these configs, or can't.
        return self.to_checkpoint() if self.dynamic_config else None

    def summary(self) -> str:
        size = "no groups" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.nbits} bits, {size}, axis {self.axis}"


def _stored(stored: Any) -> Any:
    """The same of a file, whose tensors say how they are viewed and whose bits may lie in wider
    words."""
    data = _flat(stored)
    if isinstance(data, dict):
        data.pop("view_as_float", None)
        if isinstance(bits := data.get("nbits"), int | float):
            data["nbits"] = {5: 8, 6: 8, 1.58: 2}.get(bits, bits)
    return data


def _flat(stored: Any) -> Any:
    """A ``BaseQuantizeConfig`` as fields of ours; anything else as it is."""
    if not isinstance(stored, Mapping):
        return stored
    given = stored.get(_PARAMETERS)
    rest = {key: item for key, item in stored.items() if key != _PARAMETERS}
    data = {**given, **rest} if isinstance(given, Mapping) else {**stored}
    for old, new in _NESTED.items():
        if data.pop(old, None) is not None:
            data[new] = True
    return {key: item for key, item in data.items() if key not in _DERIVED}


def rules(config: HqqConfig, origin: str) -> list[Rule]:
    """The skip list and ``dynamic_config`` as targeting rules."""
    found = [
        Rule(name, "skip", origin, reason=f"skip list: {name}", optional=True)
        for name in config.skip_modules or []
    ]
    if config.dynamic_config:
        reason = "dynamic_config does not name it"
        found.append(Rule("**", "skip", origin, reason=reason, order=-1, optional=True))
        found += [
            replace(rule, action="include")
            for rule in from_hqq_dynamic(config.dynamic_config, origin)
        ]
    return found
