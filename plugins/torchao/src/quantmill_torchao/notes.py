"""What torchao's files say of each weight in their ``__metadata__``, made and read.

Under a weight's name there is JSON: the class of its tensor, that class's attributes and the names
of the tensors it consists of. ``tensor_names`` lists all weights of the file; those that are not
quantized have the class ``Tensor``. Source: files written by torchao 0.18 and transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmill_torchao.recipes import Grain, Inputs, Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["NOTE_BYTES", "file_metadata", "inputs_of", "note_for", "parse", "plain_dtype"]

NOTE_BYTES = 1024
"""Bytes of a note with its quotes escaped, about."""
_TENSORS = {
    "Int8Tensor": ["zero_point", "qdata", "scale"],
    "IntxUnpackedToInt8Tensor": ["qdata", "scale", "zero_point"],
    "Int4Tensor": ["qdata", "scale", "zero_point"],
    "Float8Tensor": ["qdata", "scale"],
}
_PER_TOKEN = "int8_asym_per_token"


def _dtype(dtype: torch.dtype | str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def _grain(grain: Grain) -> dict[str, Any]:
    if grain.kind == "tensor":
        return {"_type": "PerTensor", "_data": {}}
    if grain.kind == "row":
        return {"_type": "PerRow", "_data": {"dim": -1}}
    return {"_type": "PerBlock", "_data": {"block_size": list(grain.size)}}


def _int8_inputs(inputs: Inputs) -> dict[str, Any]:
    mapping = "SYMMETRIC" if inputs.symmetric else "ASYMMETRIC"
    return {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": {
            "granularity": _grain(inputs.grain),
            "mapping_type": {"_type": "MappingType", "_data": mapping},
            "reduce_range": inputs.reduced,
        },
    }


def _float8_inputs(inputs: Inputs) -> dict[str, Any]:
    return {
        "_type": "QuantizeTensorToFloat8Kwargs",
        "_data": {
            "float8_dtype": _dtype(inputs.dtype),
            "granularity": _grain(inputs.grain),
            "mm_config": None,
            "hp_value_lb": inputs.low,
            "hp_value_ub": inputs.high,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
        },
    }


def note_for(recipe: Recipe, shape: tuple[int, int], dtype: torch.dtype) -> str:
    """The note of a weight ``[out, in]`` that was ``dtype`` and is made by ``recipe``."""
    block = list(recipe.grain.block(shape))
    inputs = recipe.inputs
    data: dict[str, Any]
    if recipe.tensor == "Int8Tensor":
        data = {
            "act_quant_kwargs": _int8_inputs(inputs) if inputs else None,
            "reduce_range": recipe.reduced,
            "block_size": block,
            "dtype": _dtype(dtype),
        }
    elif recipe.tensor == "IntxUnpackedToInt8Tensor":
        data = {
            "target_dtype": _dtype(f"int{recipe.bits}"),
            "block_size": block,
            "dtype": _dtype(dtype),
            "activation_quantization": _PER_TOKEN if inputs else None,
        }
    elif recipe.tensor == "Int4Tensor":
        kind = "float8_e4m3fn" if inputs else "bfloat16"
        data = {"activation_dtype": _dtype(kind), "block_size": block, "shape": list(shape)}
    else:
        fast = recipe.grain.kind != "block"
        mm = {"emulate": False, "use_fast_accum": fast, "pad_inner_dim": False}
        data = {
            "block_size": block,
            "mm_config": {"_type": "Float8MMConfig", "_data": mm} if inputs else None,
            "act_quant_kwargs": _float8_inputs(inputs) if inputs else None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            "dtype": _dtype(dtype),
        }
    made = {"_type": recipe.tensor, "_data": data, "_tensor_data_names": _TENSORS[recipe.tensor]}
    return json.dumps(made)


def file_metadata(tensors: Sequence[str], notes: Mapping[str, str]) -> dict[str, str]:
    """The ``__metadata__`` of a file with ``tensors`` and the ``notes`` of its weights."""
    # The parts of a quantized weight are called X._weight_qdata, and so on.
    plain = [name for name in tensors if "._weight_" not in name]
    said = {name: json.dumps({"_type": "Tensor"}) for name in plain}
    names = [*notes, *plain]
    return {**notes, **said, "tensor_names": json.dumps(names)} if names else {}


def parse(note: str) -> dict[str, Any] | None:
    """A note as data, or None where it is none."""
    try:
        found = json.loads(note)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("_type"), str):
        return None
    if not isinstance(found.get("_data", {}), dict):
        return None
    return found


def plain_dtype(value: Any) -> str:
    """``int4`` of ``{"_type": "torch.dtype", "_data": "int4"}``; empty for anything else."""
    found = value.get("_data") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else ""


def inputs_of(note: Mapping[str, Any]) -> Inputs | None:
    """How activations are rounded, by a note.

    Raises:
        ValueError: in a way that is not known.
    """
    data = note.get("_data", {})
    if note["_type"] == "IntxUnpackedToInt8Tensor":
        said = data.get("activation_quantization")
        if said in (None, _PER_TOKEN):
            return Inputs("int8", symmetric=False, narrow=True) if said else None
        raise ValueError(f"activation_quantization {said!r} is not known")
    if note["_type"] == "Int4Tensor":
        eight = plain_dtype(data.get("activation_dtype")) == "float8_e4m3fn"
        return Inputs("float8") if eight else None
    given = data.get("act_quant_kwargs")
    if given is None:
        return None
    kind, fields = given.get("_type"), given.get("_data")
    if kind not in ("QuantizeTensorToInt8Kwargs", "QuantizeTensorToFloat8Kwargs") or not isinstance(
        fields, Mapping
    ):
        raise ValueError(f"act_quant_kwargs of type {kind!r} is not known")
    grain = _read_grain(fields.get("granularity"))
    if kind == "QuantizeTensorToInt8Kwargs":
        mapping = plain_dtype(fields.get("mapping_type"))
        return Inputs("int8", grain, mapping != "ASYMMETRIC", bool(fields.get("reduce_range")))
    return Inputs(
        "float8",
        grain,
        low=fields.get("hp_value_lb"),
        high=fields.get("hp_value_ub"),
        dtype=plain_dtype(fields.get("float8_dtype")) or "float8_e4m3fn",
    )


def _read_grain(value: Any) -> Grain:
    kind = value.get("_type") if isinstance(value, Mapping) else None
    if kind == "PerTensor":
        return Grain("tensor")
    if kind == "PerBlock":
        sizes = value["_data"].get("block_size", [1, 128])
        return Grain("block", (int(sizes[0]), int(sizes[1])))
    if kind in ("PerRow", "PerToken"):
        return Grain("row")
    raise ValueError(f"granularity {kind!r} of activations is not known")
