"""The configuration of the compressed-tensors backend, with the field names of the library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, Field

from quantmill.config import INVALID_VALUE, MethodConfig
from quantmill.findings import FindingsError
from quantmill.targeting.dialects import from_compressed_tensors
from quantmill.targeting.types import Rule, Target
from quantmill_compressed_tensors.schemes import NAMED, Args, Scheme, args, scheme

__all__ = ["FORMATS", "CompressedConfig", "rules"]

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
"""Formats of a group that are read and written."""
_WEIGHTS = (
    "num_bits",
    "type",
    "strategy",
    "group_size",
    "symmetric",
    "block_structure",
    "scale_dtype",
    "zp_dtype",
)
_PARTS = ("weights", "input_activations", "output_activations")
_SHORT = (*_WEIGHTS, *_PARTS, "dynamic_activations")
"""What a user may say of the only group, or of all groups, without writing groups."""
_EXTRA = {"type": "extra_forbidden"}


def _plain(value: Any) -> Any:
    """Models, also within groups, as the dicts they were made of."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class Claim(NamedTuple):
    """A module matches a target of a group."""

    rank: int
    """0 for a name, 1 for an expression, 2 for a class."""
    order: str
    """Within the rank."""
    group: str
    target: str


class CompressedConfig(MethodConfig):
    """What compressed-tensors can be told.

    For one group its weights' fields may be given directly: ``num_bits``, ``type``,
    ``strategy``, ``group_size``, ``symmetric``, ``block_structure``, and ``dynamic_activations``
    to quantize activations per token.
    """

    config_groups: dict[str, Scheme] = Field(default_factory=dict)
    """Name to a group of modules that are quantized alike."""
    format: str | None = None
    """Disk layout: pack-quantized, int-quantized, naive-quantized, float-quantized, or
    mixed-precision where groups have their own."""
    quantization_status: str | None = "compressed"
    ignore: list[str] | None = None
    """Modules to keep float: names, ``re:`` expressions or classes."""
    kv_cache_scheme: Args | None = None
    """How the KV cache is quantized: kept, not applied."""
    global_compression_ratio: int | float | None = None
    sparsity_config: dict[str, Any] | None = None
    moe_sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    version: str | None = None
    """Version of the library that wrote the file."""

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = {key: _plain(value) for key, value in super().normalise(raw).items()}
        data.pop("run_compressed", None)  # how the peer runs, not what is stored
        short = {key: data.pop(key) for key in _SHORT if key in data}
        groups = data.get("config_groups")
        if isinstance(groups, Mapping):
            groups = {
                name: {**NAMED[name], "targets": group}
                if isinstance(group, list) and name in NAMED
                else group
                for name, group in groups.items()
            }
            data["config_groups"] = groups
        if short and (groups is None or isinstance(groups, Mapping)):
            data["config_groups"] = _shortened(short, groups or {}, data.get("format"))
            if data.get("format") in (None, "mixed-precision", *FORMATS):
                formats = {group.get("format") for group in data["config_groups"].values()}
                data["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
        return data

    @classmethod
    def from_user(cls, raw: Mapping[str, Any]) -> Self:
        data = dict(raw)
        if not data.get("config_groups") and not set(_SHORT) & set(data):
            data |= {"num_bits": 4, "strategy": "group", "group_size": 128}
        flag = data.get("dynamic_activations", False)
        if not isinstance(flag, bool):
            error = {"loc": ("dynamic_activations",), "input": flag, "msg": "true or false"}
            raise FindingsError([cls._finding({**error, "type": "bool"}, INVALID_VALUE)])
        config = super().from_user(data)
        strays = [
            cls._finding({"loc": ("config_groups", name, *place), **_EXTRA}, INVALID_VALUE)
            for name, group in config.config_groups.items()
            for place in _strays(group)
        ]
        if strays:
            raise FindingsError(strays)
        named = {group.stores_as for group in config.config_groups.values()}
        filled = {
            "format": config.format or (named.pop() if len(named) == 1 else "mixed-precision"),
            "quantization_status": config.quantization_status,
            "ignore": config.ignore or [],
            "kv_cache_scheme": config.kv_cache_scheme,
            "global_compression_ratio": config.global_compression_ratio,
        }
        # Set, so that they are written: readers expect them.
        return config.model_copy(update=filled)

    @classmethod
    def field_names(cls) -> list[str]:
        return [*super().field_names(), *_SHORT]

    def to_checkpoint(self) -> dict[str, Any]:
        data = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return {**data, **self.unknown, "quant_method": "compressed-tensors"}

    def keeping(self, modules: Sequence[str]) -> CompressedConfig:
        ignore = list(self.ignore or [])
        ignore += [name for name in dict.fromkeys(modules) if name not in ignore]
        return self.model_copy(update={"ignore": ignore}) if ignore else self

    def joined(self, others: Mapping[str, CompressedConfig]) -> dict[str, Any] | None:
        """A group of its own for each other config, with its modules as targets by name."""
        groups = dict(self.config_groups)
        ignore = list(self.ignore or [])
        named: list[tuple[Scheme, list[str]]] = []
        for module, other in others.items():
            if len(other.config_groups) != 1:
                return None
            ignore += [name for name in other.ignore or [] if name not in ignore]
            group = next(iter(other.config_groups.values()))
            for known, targets in named:
                if known == group:
                    targets.append(module)
                    break
            else:
                named.append((group, [module]))
        for group, targets in named:
            number = next(n for n in range(len(groups) + 1) if f"group_{n}" not in groups)
            groups[f"group_{number}"] = group.model_copy(update={"targets": targets})
        formats = {group.stores_as for group in groups.values()}
        update = {
            "config_groups": groups,
            "ignore": ignore,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        }
        return self.model_copy(update=update).to_checkpoint()

    def scheme_of(self, target: Target) -> Scheme | None:
        """The group that claims a target: by name before an expression before a class, as in the
        peer; the only group where none does (the model may have renamed its modules)."""
        return self.scheme_for(target.name, target.module.cls)

    def scheme_for(self, name: str, cls: str) -> Scheme | None:
        """The group that claims a module by its dotted name or the name of its class."""
        found = self.claims(name, cls)
        if found:
            return self.config_groups[found[0].group]
        only = list(self.config_groups.values())
        return only[0] if len(only) == 1 else None

    def claims(self, name: str, cls: str) -> list[Claim]:
        """Every target that a module matches, the one that counts first: the peer sorts
        expressions by their text."""
        found = []
        for key, group in self.config_groups.items():
            for entry in group.targets:
                if entry == name:
                    found.append(Claim(0, "", key, entry))
                elif entry.startswith("re:") and re.match(entry[3:], name):
                    found.append(Claim(1, entry, key, entry))
                elif entry == cls:
                    found.append(Claim(2, "", key, entry))
        return sorted(found, key=lambda item: item[:2])

    def summary(self) -> str:
        parts = []
        for group in self.config_groups.values():
            text = group.weights.words if group.weights is not None else "float weights"
            if group.input_activations is not None:
                text += f" with activations {group.input_activations.words}"
            parts.append(text)
        return "; ".join(dict.fromkeys(parts))


def _shortened(short: Mapping[str, Any], groups: Mapping[str, Any], form: Any) -> dict[str, Any]:
    """Groups with the fields of a user's short form on top; one group where there is none."""
    if set(short) & set(_PARTS):
        made = {key: value for key, value in short.items() if key in _PARTS}
        base = next(iter(groups.values()), {"targets": ["Linear"]})
        groups = {"group_0": {**(base if isinstance(base, Mapping) else {}), **made}}
    fields = {key: value for key, value in short.items() if key in _WEIGHTS}
    result: dict[str, Any] = {}
    for name, group in (groups or {"group_0": {}}).items():
        old = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(group, Mapping) or not isinstance(old or {}, Mapping):
            result[name] = group  # not a group at all: validation says so
            continue
        weights = args(**{**(old or {}), **fields})
        if "strategy" not in fields and "group_size" in fields:
            size = fields["group_size"]
            weights["strategy"] = "group" if isinstance(size, int) and size > 0 else "channel"
        if "strategy" not in fields and fields.get("block_structure") is not None:
            weights["strategy"] = "block"
        grouped = weights["strategy"] in ("group", "tensor_group")
        if not grouped and "group_size" not in fields:
            weights["group_size"] = None
        if weights["group_size"] == -1:
            weights["group_size"] = None
        inputs = group.get("input_activations")
        if "dynamic_activations" in short:
            inputs = None
            if short["dynamic_activations"]:
                kind = {"type": weights["type"]}
                inputs = args(strategy="token", dynamic=short["dynamic_activations"], **kind)
        whole = {**group, "weights": weights, "input_activations": inputs}
        whole.setdefault("targets", ["Linear"])
        whole.setdefault("output_activations", None)
        whole["format"] = form if form in FORMATS else _format(weights, inputs)
        result[name] = whole
    return result


def _format(weights: Mapping[str, Any], inputs: Any) -> str:
    try:
        return str(scheme(dict(weights), inputs)["format"])
    except ValueError:  # validation of the config names the field
        return "pack-quantized"


def _strays(group: Scheme) -> list[tuple[str, ...]]:
    """Places of keys that nobody knows."""
    found: list[tuple[str, ...]] = [(key,) for key in group.model_extra or {}]
    for part in _PARTS:
        value = getattr(group, part)
        found += [(part, key) for key in (value.model_extra or {} if value is not None else {})]
    return found


def rules(config: CompressedConfig, origin: str) -> list[Rule]:
    """``config_groups`` and ``ignore`` as targeting rules."""
    groups = {name: _plain(group) for name, group in config.config_groups.items()}
    found = from_compressed_tensors(groups, config.ignore or [], origin)
    plain = [group.targets for group in config.config_groups.values()] == [["Linear"]]
    if origin == "user" and plain:
        # All linear layers, which is the default anyway, and the default leaves the head float.
        return [rule for rule in found if rule.reason.startswith("ignore")]
    return found
