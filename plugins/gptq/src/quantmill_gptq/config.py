"""The configuration of the GPTQ backend, with the field names of GPTQModel and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from quantmill.config import GroupSize, MethodConfig
from quantmill.targeting.dialects import from_gptq_dynamic
from quantmill.targeting.types import Rule
from quantmill_gptq.widths import PLANAR_ONLY, widths

__all__ = ["GptqConfig", "is_gptq", "rules"]

_RUNTIME = (
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "max_input_length",
    "model_seqlen",
    "module_name_preceding_first_block",
    "pad_token_id",
    "tokenizer",
    "use_cuda_fp16",
    "use_exllama",
)
"""Fields of transformers' ``GPTQConfig`` that say how its own quantizer runs: accepted, unused."""

_UNREFINED = 128
"""Width of groups from which on codes are not chosen a second time unless told to be: novella's
divergence falls by 5% with groups of 32, 3% with 64, and 1% with 128."""
_THOROUGH: Mapping[str, Any] = {"gptaq_alpha": 0.75, "refinements": 4}
"""With them novella's divergence falls by 16% with 4 bits, and a run takes two to three times as
long."""


class GptqConfig(MethodConfig):
    """What GPTQ can be told; names are those of GPTQModel, and defaults but that of ``mse``."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {"damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse"}
    )

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("desc_act", "act_group_aware"),)

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    group_size: GroupSize = 128
    """Input columns that share a scale; -1 for one group per row."""
    sym: bool = True
    """Symmetric: the zero point is the middle code."""
    desc_act: bool = False
    """Act-order: columns in the order of falling input energy; scales follow that order."""
    act_group_aware: bool = True
    """Unless ``desc_act``: whole groups, and columns within them, in the order of falling
    energy. Scales stay in their places, so it costs nothing at inference."""
    static_groups: bool = False
    """Scales of all groups are fixed before the first column is rounded."""
    true_sequential: bool = True
    """Quantize the linears of a block in the order in which they run, each with the inputs that
    the quantized ones before it give."""
    damp_percent: float = Field(0.05, gt=0, lt=1)
    """Share of the mean diagonal of the Hessian that is added to its diagonal."""
    damp_auto_increment: float = Field(0.01, ge=0)
    """Added to ``damp_percent`` each time the Hessian is not positive definite."""
    mse: float = Field(2.0, ge=0)
    """Exponent of the error that shrunk ranges are chosen by; 0 takes the full range, as
    GPTQModel does unless told otherwise."""
    refinements: int | None = Field(None, ge=0, le=20, exclude=True)
    """Passes over all codes and scales after the first, each chosen again for the others as they
    are. The first of them costs as much as everything before it; unless told otherwise there is
    one for groups of less than 128 columns, where it lowers the divergence most."""
    gptaq_alpha: float = Field(0.0, ge=0, le=1, exclude=True)
    """Share of the errors of all linears before that a weight makes up for (GPTAQ, arXiv
    2504.02692): its outputs on the inputs it gets are fitted to those that the float model has.
    Each block then runs twice. 0 for none."""
    lm_head: bool = False
    """Quantize the output head too."""
    dynamic: dict[str, dict[str, Any]] | None = None
    """Regular expression of module names (``-:`` skips) to fields that differ there."""
    modules_in_block_to_quantize: list[list[str]] | None = None
    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""
    checkpoint_format: Literal["gptq", "gptq_v2", "gptq_p"] = "gptq"
    """v1 stores zero points minus one, v2 as they are. The planar one has 5, 6 and 7 bits too, and
    is the default where they are asked for."""
    pack_dtype: Literal["int32"] = "int32"
    meta: dict[str, Any] | None = None
    """What the writer noted about itself; kept."""

    @model_validator(mode="before")
    @classmethod
    def _one_order(cls, data: Any) -> Any:
        # Act-order is an order of its own; the peer takes only one of the two.
        if isinstance(data, dict) and data.get("desc_act") is True:
            data = {"act_group_aware": False, **data}
        return data

    @model_validator(mode="after")
    def _format_has_the_width(self) -> Self:
        if self.bits not in widths(self.checkpoint_format):
            raise ValueError(
                f"{self.bits} bits are in checkpoint_format gptq_p only, not in"
                f" {self.checkpoint_format}"
            )
        return self

    @field_validator("dynamic")
    @classmethod
    def _entries(cls, value: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for entry, options in (value or {}).items():
            stray = set(options) - set(cls.model_fields)
            if stray:
                raise ValueError(f"{entry!r} sets unknown fields {sorted(stray)}")
        return value

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        written = data.pop("format", None)
        if written is not None:
            data.setdefault("checkpoint_format", written)
        meta = data.get("meta") or {}
        for name in (
            "damp_percent",
            "damp_auto_increment",
            "static_groups",
            "true_sequential",
            "act_group_aware",
            "mse",
        ):
            value = meta.get(name) if isinstance(meta, Mapping) else None
            if value is not None:
                data.setdefault(name, value)
        for name in _RUNTIME:
            data.pop(name, None)
        if data.get("group_size") is None:
            data.pop("group_size", None)
        return data

    @classmethod
    def from_user(cls, raw: Mapping[str, Any]) -> Self:
        data = dict(raw)
        if not {"checkpoint_format", "format"} & set(data):
            modules = [data, *(item for item in _entries(data) if isinstance(item, Mapping))]
            if any(str(item.get("bits")) in map(str, PLANAR_ONLY) for item in modules):
                data["checkpoint_format"] = "gptq_p"
            elif data.get("sym") is False:
                # GPTQModel takes asymmetric v1 only from itself: its early files held other zeros.
                data["checkpoint_format"] = "gptq_v2"
        return super().from_user(data)

    @classmethod
    def field_names(cls) -> list[str]:
        return [*super().field_names(), "format"]

    def to_checkpoint(self) -> dict[str, Any]:
        data = super().to_checkpoint()
        for name in ("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert", "meta"):
            if data.get(name) is None:
                data.pop(name, None)
        data |= {"quant_method": "gptq", "method": "gptq", "format": self.checkpoint_format}
        return data

    def extra_files(self, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": dict(stored)}

    def keeping(self, modules: Sequence[str]) -> GptqConfig:
        # GPTQModel and transformers quantize nothing outside the blocks unless told to.
        names = sorted(set(self.modules_to_not_convert or []) | set(modules) - {"lm_head"})
        return self.model_copy(update={"modules_to_not_convert": names or None})

    def shared(self, others: Sequence[GptqConfig]) -> dict[str, Any]:
        """A checkpoint has one layout."""
        formats = {self.checkpoint_format, *(item.checkpoint_format for item in others)}
        latest = next(name for name in ("gptq_p", "gptq_v2", "gptq") if name in formats)
        return {} if self.checkpoint_format == latest else {"checkpoint_format": latest}

    def thorough(self) -> dict[str, Any]:
        return {
            name: value for name, value in _THOROUGH.items() if name not in self.model_fields_set
        }

    def joined(self, others: Mapping[str, GptqConfig]) -> dict[str, Any] | None:
        """``dynamic`` says it, unless a module differs in something that is not per module."""
        import re

        per_module = {"bits", "group_size", "sym", "desc_act"}
        dynamic: dict[str, dict[str, Any]] = {}
        for name, other in others.items():
            fields = set(type(self).model_fields) - {"dynamic", "unknown"}
            differing = {f for f in fields if getattr(self, f) != getattr(other, f)}
            if differing - per_module:
                return None
            dynamic[f"+:^{re.escape(name)}$"] = {f: getattr(other, f) for f in sorted(differing)}
        merged = self.dynamic or dynamic
        return self.model_copy(update={"dynamic": merged}).to_checkpoint()

    @property
    def maximum(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def grid(self) -> tuple[int, bool, float]:
        """The largest code, whether zero is the middle one, and the exponent that ranges are
        chosen by."""
        return self.maximum, self.sym, self.mse

    @property
    def passes(self) -> int:
        """``refinements``, or how many are worth their time."""
        if self.refinements is not None:
            return self.refinements
        return 1 if 0 < self.group_size < _UNREFINED else 0

    def summary(self) -> str:
        size = "per row" if self.group_size == -1 else f"groups of {self.group_size}"
        kind = "symmetric" if self.sym else "asymmetric"
        order = ", act-order" if self.desc_act else ""
        return f"{self.bits} bits, {size}, {kind}{order}"


def _entries(data: Mapping[str, Any]) -> list[Any]:
    dynamic = data.get("dynamic")
    return list(dynamic.values()) if isinstance(dynamic, Mapping) else []


def is_gptq(raw: Mapping[str, Any]) -> bool:
    """Whether a config with ``quant_method: gptq`` is in a layout that this plugin reads."""
    return str(raw.get("checkpoint_format") or raw.get("format") or "gptq").startswith("gptq")


def rules(config: GptqConfig, origin: str) -> list[Rule]:
    """``dynamic``, the skip list and ``lm_head`` as targeting rules."""
    found = from_gptq_dynamic(config.dynamic or {}, origin)
    found += [
        Rule(name, "skip", origin, reason=f"skip list: {name}", optional=True)
        for name in config.modules_to_not_convert or []
    ]
    if config.lm_head:
        found.append(Rule("role:head", "include", origin, reason="lm_head is set"))
    if config.modules_in_block_to_quantize:
        names = [name for part in config.modules_in_block_to_quantize for name in part]
        found.append(
            Rule("**", "skip", origin, reason="not in modules_in_block_to_quantize", order=-2)
        )
        found += [
            Rule(name, "include", origin, reason="modules_in_block_to_quantize", order=-1)
            for name in names
        ]
    return found
