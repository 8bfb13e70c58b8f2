"""The configuration of the torchao backend, with the field names of transformers and torchao."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import field_validator

from quantmill.config import MethodConfig
from quantmill.findings import FindingsError
from quantmill.targeting.dialects import from_torchao_fqn, from_transformers_skip
from quantmill.targeting.types import Rule
from quantmill_torchao.classes import CONFIGS, FQN, described
from quantmill_torchao.recipes import Recipe, read

__all__ = ["TorchaoConfig", "from_object", "rules"]

_FIELDS = {field for _, fields in CONFIGS.values() for field in fields}
_OLD = "transformers no longer reads names of this kind; give a config of torchao"


class TorchaoConfig(MethodConfig):
    """What torchao can be told: ``quant_type`` is a config of torchao in its own words.

    A user may write its class and fields side by side: ``quant_type: IntxWeightOnlyConfig,
    weight_dtype: int4, granularity: PerGroup(64)``.
    """

    quant_type: dict[str, Any] = {"default": described("Int8WeightOnlyConfig", {})}  # noqa: RUF012
    """``{"default": config}``, where ``FqnToConfig`` gives each module a config of its own."""
    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""
    include_input_output_embeddings: bool = False
    """Quantize the embedding and the head too."""
    untie_embedding_weights: Literal[False] = False
    """Tied weights stay tied, and float."""

    @field_validator("quant_type", mode="before")
    @classmethod
    def _problem(cls, value: Any) -> Any:
        if isinstance(value, str):  # what normalise() could not read, in words
            raise ValueError(value)
        return value

    @field_validator("quant_type")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        if set(value) != {"default"}:
            raise ValueError("it has one key, 'default', with a config of torchao")
        entry = value["default"]
        if isinstance(entry, Mapping) and entry.get("_type") == FQN:
            table = _table(entry)
            for name, item in table.items():
                if item is not None:
                    try:
                        read(item)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None
            if not any(table.values()):
                raise ValueError(f"{FQN} gives no module a config")
        else:
            read(entry)
        return value

    @classmethod
    def field_names(cls) -> list[str]:
        return [*super().field_names(), *sorted(_FIELDS)]

    @classmethod
    def from_user(cls, raw: Mapping[str, Any]) -> Self:
        try:
            return super().from_user(raw)
        except FindingsError as error:
            # What is wrong with the whole is often one field that the user gave beside it.
            given = [field for field in raw if field in _FIELDS]
            raise FindingsError(
                [
                    next(
                        (replace(item, where=field) for field in given if field in item.cause), item
                    )
                    if item.where == "quant_type"
                    else item
                    for item in error.findings
                ]
            ) from None

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        if data.get("modules_to_not_convert") == []:
            data["modules_to_not_convert"] = None
        fields = {key: data.pop(key) for key in list(data) if key in _FIELDS}
        given = data.get("quant_type")
        if isinstance(given, Mapping) and set(given) == {"default"}:
            given = given["default"]
        if given is None and fields:
            given = "Int8WeightOnlyConfig"
        if isinstance(given, str):
            if given not in CONFIGS:
                hint = f"; {_OLD}" if "_" in given else ""
                return {**data, "quant_type": f"{given} is none of {', '.join(CONFIGS)}{hint}"}
            given = {"_type": given, "_version": CONFIGS[given][0], "_data": {}}
        if isinstance(given, Mapping):
            name: Any
            name, inner = given.get("_type"), given.get("_data")
            known = name in CONFIGS and given.get("_version", 1) == CONFIGS[name][0]
            if known and isinstance(inner, Mapping):
                try:
                    given = described(name, {**inner, **fields})
                except ValueError as error:
                    return {**data, "quant_type": str(error)}
            data["quant_type"] = {"default": dict(given)}
        return data

    @property
    def entry(self) -> dict[str, Any]:
        """The config of torchao."""
        found: dict[str, Any] = self.quant_type["default"]
        return found

    @property
    def recipe(self) -> Recipe:
        """What it means; of several, the default or the first."""
        if self.entry["_type"] != FQN:
            return read(self.entry)
        table = _table(self.entry)
        first = table.get("_default") or next(item for item in table.values() if item)
        return read(first)

    def recipe_of(self, name: str) -> Recipe | None:
        """What it means for the module ``name``; None where it is kept float."""
        if self.entry["_type"] != FQN:
            return read(self.entry)
        table = _table(self.entry)
        found: Any = table.get("_default")
        for key in (f"{name}.weight", name):
            if key in table:
                return read(table[key]) if table[key] else None
        for key, item in table.items():
            if key.startswith("re:") and any(
                re.fullmatch(key[3:], word) for word in (f"{name}.weight", name)
            ):
                found = item
                break
        return read(found) if found else None

    def to_checkpoint(self) -> dict[str, Any]:
        return {**super().to_checkpoint(), "quant_method": "torchao"}

    def keeping(self, modules: Sequence[str]) -> TorchaoConfig:
        names = sorted({*(self.modules_to_not_convert or []), *modules})
        return self.model_copy(update={"modules_to_not_convert": names or None})

    def joined(self, others: Mapping[str, TorchaoConfig]) -> dict[str, Any] | None:
        """``FqnToConfig``: the others by name, and this one for what is not named."""
        table = {name: other.entry for name, other in others.items()}
        if any(item["_type"] == FQN for item in (self.entry, *table.values())):
            return None
        table["_default"] = self.entry
        skip = {*(self.modules_to_not_convert or [])}
        for other in others.values():
            skip |= {*(other.modules_to_not_convert or [])}
        made = {
            "_type": FQN,
            "_version": 1,
            "_data": {"fqn_to_config": table, "module_fqn_to_config": table},
        }
        update = {"quant_type": {"default": made}, "modules_to_not_convert": sorted(skip) or None}
        return self.model_copy(update=update).to_checkpoint()

    def summary(self) -> str:
        more = " and others by name" if self.entry["_type"] == FQN else ""
        return self.recipe.words + more


def _table(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Name to config of an ``FqnToConfig``."""
    data = entry.get("_data")
    found: Any = data if isinstance(data, Mapping) else {}
    table = found.get("fqn_to_config") or found.get("module_fqn_to_config") or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"fqn_to_config of {FQN} is no mapping")
    return dict(table)


def rules(config: TorchaoConfig, origin: str) -> list[Rule]:
    """The skip list and ``FqnToConfig`` as targeting rules."""
    found = from_transformers_skip(config.modules_to_not_convert or [], origin)
    if not config.include_input_output_embeddings:
        reason = "include_input_output_embeddings is not set"
        found.append(Rule("role:embedding", "skip", "plugin:torchao", reason=reason, optional=True))
    else:
        found += [
            Rule(role, "include", origin, reason="include_input_output_embeddings", optional=True)
            for role in ("role:embedding", "role:head")
        ]
    if config.entry["_type"] == FQN:
        found += [
            rule
            if rule.options is None
            else replace(rule, options={"quant_type": {"default": rule.options["config"]}})
            for rule in from_torchao_fqn(_table(config.entry), origin)
        ]
    return found


def from_object(value: Any) -> dict[str, Any] | None:
    """The config that an ``AOBaseConfig`` of torchao stands for; None for other objects."""
    from torchao.core.config import AOBaseConfig, config_to_dict

    if not isinstance(value, AOBaseConfig):
        return None
    return {"quant_method": "torchao", "quant_type": {"default": config_to_dict(value)}}
