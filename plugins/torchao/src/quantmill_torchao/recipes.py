"""What a config of torchao means: which tensor it makes of a weight, and how it rounds inputs.

The configs themselves, as data, are in :mod:`quantmill_torchao.classes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantmill_torchao.classes import CONFIGS, FQN, ROW, TENSOR

__all__ = ["Grain", "Inputs", "Recipe", "read"]

_MAPPINGS = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC")


@dataclass(frozen=True, slots=True)
class Grain:
    """Which elements share a scale: ``tensor``, ``row``, ``group`` or ``block``."""

    kind: str
    size: tuple[int, ...] = ()
    """Columns of a group, or rows and columns of a block."""

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale of a weight of ``shape``."""
        if self.kind == "tensor":
            return shape
        if self.kind == "row":
            return 1, shape[1]
        return (1, self.size[0]) if self.kind == "group" else (self.size[0], self.size[1])

    @property
    def words(self) -> str:
        """For tables."""
        sizes = "x".join(str(item) for item in self.size)
        return f"{self.kind} {sizes}".strip()


@dataclass(frozen=True, slots=True)
class Inputs:
    """How activations are rounded, each time."""

    kind: str
    """``int8`` or ``float8``."""
    grain: Grain = Grain("row")
    symmetric: bool = True
    reduced: bool = False
    low: float | None = None
    high: float | None = None
    dtype: str = "float8_e4m3fn"
    narrow: bool = False
    """Codes are computed in the dtype of the inputs, not in float32."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a config means for a weight."""

    tensor: str
    """Class of the tensor that torchao makes of it, by which it is stored."""
    bits: int
    grain: Grain
    mapping: str = "SYMMETRIC"
    algorithm: str = "AFFINE"
    values: str = "float8_e4m3fn"
    scale_dtype: str | None = None
    inputs: Inputs | None = None
    reduced: bool = False
    """Seven of the eight bits are used, for processors whose sums overflow."""

    @property
    def words(self) -> str:
        """For tables: ``int4, group 128``."""
        kind = "float8" if self.tensor == "Float8Tensor" else f"int{self.bits}"
        inputs = f", {self.inputs.kind} activations" if self.inputs else ""
        return f"{kind}, {self.grain.words}{inputs}"


def read(entry: Any) -> Recipe:
    """What a config in torchao's words means.

    Raises:
        ValueError: the class, its version or a value is not known.
    """
    if not isinstance(entry, Mapping) or "_type" not in entry:
        raise ValueError("a config of torchao is an object with _type, _version and _data")
    name = entry["_type"]
    if name not in CONFIGS:
        raise ValueError(f"_type {name!r} is not known; known are {', '.join(CONFIGS)}, {FQN}")
    version, defaults = CONFIGS[name]
    if entry.get("_version", 1) != version:
        raise ValueError(
            f"_version {entry.get('_version')!r} of {name} is not known; known is {version}"
        )
    data = entry.get("_data")
    if not isinstance(data, Mapping):
        raise ValueError(f"_data of {name} is no object")
    made: Recipe = _READERS[name]({**defaults, **data})
    return made


def _name(value: Any, field: str, allowed: tuple[str, ...] = ()) -> str:
    found = value.get("_data") if isinstance(value, Mapping) else value
    if not isinstance(found, str) or (allowed and found not in allowed):
        words = f"; known are {', '.join(allowed)}" if allowed else ""
        raise ValueError(f"{field} is {found!r}{words}")
    return found


def _size(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} is {value!r}, not a number above 0")
    return value


def _read_grain(value: Any, field: str, allowed: tuple[str, ...]) -> Grain:
    kind = value.get("_type") if isinstance(value, Mapping) else None
    data = value.get("_data") if isinstance(value, Mapping) else None
    if kind not in allowed or not isinstance(data, Mapping):
        raise ValueError(f"{field} is {kind or value!r}; known are {', '.join(allowed)}")
    if kind == "PerTensor":
        return Grain("tensor")
    if kind == "PerGroup":
        return Grain("group", (_size(data.get("group_size"), f"group_size of {field}"),))
    if kind == "PerBlock":
        sizes = data.get("block_size")
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise ValueError(f"block_size of {field} is {sizes!r}, not two numbers")
        rows, columns = (_size(item, f"block_size of {field}") for item in sizes)
        return Grain("block", (rows, columns))
    axis = data.get("axis", 0) if kind == "PerAxis" else data.get("dim", -1)
    if axis != (0 if kind == "PerAxis" else -1):
        raise ValueError(f"{field} is {kind}({axis}); scales are by rows here")
    return Grain("row")


def _two(value: Any) -> tuple[Any, Any]:
    """Granularities of activations and weights."""
    if value is None:
        return ROW, ROW
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(f"granularity has {len(value)} entries, not 2")
        return value[0], value[1]
    return value, value


def _bits(value: Any, field: str) -> int:
    allowed = tuple(f"int{bits}" for bits in range(1, 9))
    return int(_name(value, field, allowed).removeprefix("int"))


def _scales(value: Any, field: str) -> str | None:
    return None if value is None else _name(value, field, ("float32", "bfloat16", "float16"))


def _intx(data: Mapping[str, Any], prefix: str, inputs: Inputs | None) -> Recipe:
    packing = _name(data["intx_packing_format"], "intx_packing_format").upper()
    if packing != "UNPACKED_TO_INT8":
        raise ValueError(
            f"intx_packing_format is {packing}, which is opaque and not stored in safetensors;"
            " take UNPACKED_TO_INT8"
        )
    grain = _read_grain(
        data[prefix + "granularity"], prefix + "granularity", ("PerAxis", "PerGroup")
    )
    return Recipe(
        "IntxUnpackedToInt8Tensor",
        _bits(data["weight_dtype"], "weight_dtype"),
        grain,
        mapping=_name(data[prefix + "mapping_type"], prefix + "mapping_type", _MAPPINGS),
        algorithm=_name(
            data["intx_choose_qparams_algorithm"],
            "intx_choose_qparams_algorithm",
            ("AFFINE", "HQQ_SCALE_ONLY"),
        ),
        scale_dtype=_scales(data[prefix + "scale_dtype"], prefix + "scale_dtype"),
        inputs=inputs,
    )


def _intx_dynamic(data: Mapping[str, Any]) -> Recipe:
    _name(data["act_mapping_type"], "act_mapping_type", ("ASYMMETRIC",))
    return _intx(data, "weight_", Inputs("int8", symmetric=False, narrow=True))


def _int4(data: Mapping[str, Any], inputs: Inputs | None = None) -> Recipe:
    packing = _name(data["int4_packing_format"], "int4_packing_format").upper()
    tensors = {"PLAIN": "Int4Tensor", "TILE_PACKED_TO_4D": "Int4TilePackedTo4dTensor"}
    if packing not in tensors:
        raise ValueError(
            f"int4_packing_format is {packing}, which is for one device only and not stored here;"
            f" take {' or '.join(tensors)}"
        )
    algorithm = _name(
        data["int4_choose_qparams_algorithm"],
        "int4_choose_qparams_algorithm",
        ("TINYGEMM", "HQQ"),
    )
    if algorithm == "HQQ" and packing == "PLAIN":
        raise ValueError("int4_choose_qparams_algorithm HQQ is for TILE_PACKED_TO_4D only")
    size = _size(data["group_size"], "group_size")
    mapping = "SYMMETRIC" if inputs else "ASYMMETRIC"
    return Recipe(tensors[packing], 4, Grain("group", (size,)), mapping, algorithm, inputs=inputs)


def _float8_int4(data: Mapping[str, Any]) -> Recipe:
    if _name(data["int4_packing_format"], "int4_packing_format").upper() != "PLAIN":
        raise ValueError("int4_packing_format preshuffled is not stored; take plain")
    defaults = CONFIGS["Int4WeightOnlyConfig"][1]
    return _int4({**defaults, "group_size": 128}, Inputs("float8"))


def _int8(data: Mapping[str, Any]) -> Recipe:
    if data.get("group_size") is not None:
        raise ValueError("group_size was version 1's; take granularity=PerGroup(size)")
    allowed = ("PerRow", "PerTensor", "PerGroup")
    return Recipe("Int8Tensor", 8, _read_grain(data["granularity"], "granularity", allowed))


def _int8_dynamic(data: Mapping[str, Any]) -> Recipe:
    mapping = _name(data["act_mapping_type"], "act_mapping_type", ("SYMMETRIC", "ASYMMETRIC"))
    first, second = _two(data["granularity"])
    allowed = ("PerRow", "PerTensor")
    reduced = bool(data.get("reduce_range"))
    inputs = Inputs(
        "int8", _read_grain(first, "granularity", allowed), mapping == "SYMMETRIC", reduced
    )
    grain = _read_grain(second, "granularity", allowed)
    return Recipe("Int8Tensor", 8, grain, inputs=inputs, reduced=reduced)


def _float8(data: Mapping[str, Any]) -> Recipe:
    allowed = ("PerRow", "PerTensor", "PerGroup")
    granularity = data["granularity"] if data["granularity"] is not None else ROW
    return Recipe(
        "Float8Tensor",
        8,
        _read_grain(granularity, "granularity", allowed),
        values=_values(data["weight_dtype"], "weight_dtype"),
    )


def _values(value: Any, field: str) -> str:
    return _name(value, field, ("float8_e4m3fn", "float8_e5m2"))


def _float8_dynamic(data: Mapping[str, Any]) -> Recipe:
    packing = _name(data["packing_format"], "packing_format").upper()
    if packing != "PLAIN":
        raise ValueError(f"packing_format {packing} is sparse, which is not supported; take PLAIN")
    given = data["granularity"]
    first, second = _two([TENSOR, TENSOR] if given is None else given)
    allowed = ("PerRow", "PerTensor", "PerBlock")
    for name in ("activation_value_lb", "activation_value_ub"):
        value = data[name]
        if value is not None and (not isinstance(value, int | float) or value <= 0):
            raise ValueError(f"{name} is {value!r}, not a number above 0")
    inputs = Inputs(
        "float8",
        _read_grain(first, "granularity", allowed),
        low=data["activation_value_lb"],
        high=data["activation_value_ub"],
        dtype=_values(data["activation_dtype"], "activation_dtype"),
    )
    return Recipe(
        "Float8Tensor",
        8,
        _read_grain(second, "granularity", allowed),
        values=_values(data["weight_dtype"], "weight_dtype"),
        inputs=inputs,
    )


_READERS: Final[dict[str, Any]] = {
    "Int4WeightOnlyConfig": _int4,
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "IntxWeightOnlyConfig": lambda data: _intx(data, "", None),
    "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
    "Float8DynamicActivationInt4WeightConfig": _float8_int4,
}
