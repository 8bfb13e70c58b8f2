"""torchao's configs as data: their fields, defaults and versions, and how a user may write them.

Names, defaults and versions are those of torchao 0.18 (``torchao.quantization``); a test compares
them. A config in a file is ``{"_type": class, "_version": number, "_data": fields}``, where fields
that are enums, data types and granularities are nested in the same way. Nothing of torchao is
imported for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["CONFIGS", "FQN", "ROW", "TENSOR", "described", "short"]

FQN: Final = "FqnToConfig"
"""The config of configs: name of a module to the config that it gets."""


def _dtype(name: str) -> dict[str, Any]:
    return {"_type": "torch.dtype", "_data": name}


def _enum(kind: str, name: str) -> dict[str, Any]:
    return {"_type": kind, "_data": name}


def _grain(kind: str, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": 1, "_data": data}


ROW = _grain("PerRow", dim=-1)
TENSOR = _grain("PerTensor")
_E4M3 = _dtype("float8_e4m3fn")
_INTX = {
    "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
    "intx_choose_qparams_algorithm": _enum("IntxChooseQParamsAlgorithm", "AFFINE"),
}
_INDUCTOR = {"set_inductor_config": True}

CONFIGS: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "Int4WeightOnlyConfig": (
        2,
        {
            "group_size": 128,
            **_INDUCTOR,
            "int4_packing_format": _enum("Int4PackingFormat", "PLAIN"),
            "int4_choose_qparams_algorithm": _enum("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
            "int4_tile_packed_ntile": 8,
        },
    ),
    "Int8WeightOnlyConfig": (2, {"group_size": None, "granularity": ROW, **_INDUCTOR}),
    "Int8DynamicActivationInt8WeightConfig": (
        2,
        {
            "act_mapping_type": _enum("MappingType", "SYMMETRIC"),
            "weight_only_decode": False,
            "granularity": ROW,
            **_INDUCTOR,
            "reduce_range": False,
        },
    ),
    "IntxWeightOnlyConfig": (
        2,
        {
            "weight_dtype": _dtype("int8"),
            "granularity": _grain("PerAxis", axis=0),
            "mapping_type": _enum("MappingType", "SYMMETRIC"),
            "scale_dtype": None,
            **_INTX,
        },
    ),
    "Int8DynamicActivationIntxWeightConfig": (
        2,
        {
            "weight_dtype": _dtype("int8"),
            "weight_granularity": _grain("PerGroup", group_size=32),
            "weight_mapping_type": _enum("MappingType", "SYMMETRIC"),
            "weight_scale_dtype": None,
            "act_mapping_type": _enum("MappingType", "ASYMMETRIC"),
            **_INTX,
        },
    ),
    "Float8WeightOnlyConfig": (
        2,
        {"weight_dtype": _E4M3, **_INDUCTOR, "granularity": ROW},
    ),
    "Float8DynamicActivationFloat8WeightConfig": (
        2,
        {
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "granularity": [TENSOR, TENSOR],
            "packing_format": _enum("Float8PackingFormat", "PLAIN"),
            "mm_config": {
                "_type": "Float8MMConfig",
                "_version": 1,
                "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
            },
            "activation_value_lb": None,
            "activation_value_ub": None,
            "kernel_preference": _enum("KernelPreference", "AUTO"),
            **_INDUCTOR,
            "alg_id": 0,
        },
    ),
    "Float8DynamicActivationInt4WeightConfig": (1, {"int4_packing_format": "preshuffled"}),
}
"""Class to its version and the fields that it writes."""

_DTYPES = ("weight_dtype", "scale_dtype", "weight_scale_dtype", "activation_dtype")
_ENUMS = {
    "int4_packing_format": "Int4PackingFormat",
    "int4_choose_qparams_algorithm": "Int4ChooseQParamsAlgorithm",
    "intx_packing_format": "IntxPackingFormat",
    "intx_choose_qparams_algorithm": "IntxChooseQParamsAlgorithm",
    "act_mapping_type": "MappingType",
    "mapping_type": "MappingType",
    "weight_mapping_type": "MappingType",
    "packing_format": "Float8PackingFormat",
    "kernel_preference": "KernelPreference",
}
_NUMBER = {"PerGroup": "group_size", "PerAxis": "axis", "PerRow": "dim"}


def short(name: str, value: Any) -> Any:
    """A field's value as a user may write it (``int4``, ``PerGroup(64)``) in torchao's words.

    Raises:
        ValueError: it can't be read.
    """
    if isinstance(value, list | tuple) and name.endswith("granularity"):
        return [short(name, item) for item in value]
    if not isinstance(value, str):
        return value
    if name in _DTYPES:
        return _dtype(value.removeprefix("torch."))
    if name in _ENUMS:
        return _enum(_ENUMS[name], value.rpartition(".")[2].upper())
    if name.endswith("granularity"):
        found = re.fullmatch(r"(Per\w+?)(?:\(([\d,\s=\w\[\]-]*)\))?", value.strip())
        if found is None:
            raise ValueError(f"{value!r} is no granularity: PerRow, PerTensor, PerGroup(64), ...")
        kind, numbers = found.group(1), [int(n) for n in re.findall(r"-?\d+", found.group(2) or "")]
        if kind == "PerBlock" and len(numbers) == 2:
            return _grain(kind, block_size=numbers)
        if kind in ("PerRow", "PerAxis") and not numbers:
            return ROW if kind == "PerRow" else _grain("PerAxis", axis=0)
        if kind == "PerTensor" and not numbers:
            return TENSOR
        if kind in _NUMBER and len(numbers) == 1:
            return _grain(kind, **{_NUMBER[kind]: numbers[0]})
        raise ValueError(f"{value!r} is no granularity with its sizes, for example PerGroup(64)")
    return value


def described(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config in torchao's words: class ``name`` with ``fields`` over its defaults.

    Raises:
        ValueError: a field is not one of the class, or can't be read.
    """
    version, defaults = CONFIGS[name]
    stray = sorted(set(fields) - set(defaults))
    if stray:
        raise ValueError(f"{name} has no field {stray[0]!r}; it has {', '.join(defaults)}")
    given = {key: short(key, value) for key, value in fields.items()}
    if name.startswith("Float8Dynamic") and isinstance(given.get("granularity"), Mapping):
        given["granularity"] = [given["granularity"]] * 2
    return {"_type": name, "_version": version, "_data": {**defaults, **given}}
