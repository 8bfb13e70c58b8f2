"""What a GGUF file is to transformers: the config, and what each parameter is made of.

The families are in :mod:`quantmill_gguf.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from quantmill.findings import Finding, QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.architectures import FAMILIES, by_architecture
from quantmill_gguf.architectures.family import Entry
from quantmill_gguf.architectures.keys import Keys
from quantmill_gguf.architectures.rope import FREQUENCIES, LONG, SHORT
from quantmill_gguf.container import Array, GgufTensor

__all__ = ["TABLES", "HfModel", "Parameter", "describe", "shown"]

TABLES: Final = (FREQUENCIES, LONG, SHORT)
"""Tensors that become a part of the config."""
_AGAIN: Final = "the file is damaged: get it again, or convert the model anew"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model, found in the file."""

    entry: Entry
    shape: tuple[int, ...]
    type_name: str
    """ggml's name of the type of its tensors."""
    packed: bool
    """Given as quantized rows."""


@dataclass(slots=True)
class HfModel:
    """A file as transformers knows the model."""

    config: dict[str, Any]
    """Empty where the architecture is not known."""
    parameters: dict[str, Parameter]
    rest: list[str]
    """Tensors of the file that are none of the model's."""
    findings: list[Finding] = field(default_factory=list)


def describe(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    file: str,
    tables: Mapping[str, bytes] | None = None,
) -> HfModel:
    """Config and parameters of a file.

    Args:
        metadata: of the first file.
        tensors: of all files.
        file: name of the file, for messages.
        tables: the little-endian float32 bytes of :data:`TABLES`, of those that are there.

    Raises:
        QuantmillError: the architecture is known, and its metadata or tensors are not what they
            must be.
    """
    name = metadata.get("general.architecture")
    family = by_architecture(name)
    if family is None:
        known = ", ".join(sorted(item.arch for item in FAMILIES))
        cause = f"general.architecture is {name!r:.60}; known are {known}"
        fix = "it can be inspected, not loaded; load the model's folder in place of the file"
        return HfModel({}, {}, list(tensors), [codes.UNKNOWN_ARCHITECTURE(file, cause, fix)])
    keys = Keys(metadata, family.arch, file)
    keys.tables = dict(tables or {})
    config = family.read(keys, tensors)
    parameters: dict[str, Parameter] = {}
    used = set(TABLES)
    findings: list[Finding] = []
    for entry in (*family.older(config, tensors), *family.entries(config)):
        there = [item for item in entry.tensors if item in tensors]
        if not there or entry.parameter in parameters:
            continue
        used.update(there)
        if len(there) != len(entry.tensors):
            lost = ", ".join(item for item in entry.tensors if item not in tensors)
            cause = f"it lacks {lost}, which {entry.parameter} is made of"
            raise QuantmillError(codes.BAD_TENSOR(file, cause, _AGAIN))
        parameters[entry.parameter] = _parameter(entry, tensors, file, findings)
    rest = [item for item in tensors if item not in used]
    return HfModel(config, parameters, rest, findings)


def _parameter(
    entry: Entry, tensors: Mapping[str, GgufTensor], file: str, findings: list[Finding]
) -> Parameter:
    parts = [tensors[item] for item in entry.tensors]
    shapes = [item.shape for item in parts]

    def refuse(cause: str) -> QuantmillError:
        where = f"{file}: {entry.tensors[0]}"
        return QuantmillError(codes.BAD_TENSOR(where, cause, _AGAIN))

    shape: tuple[int, ...] | None = shapes[0]
    if entry.part is not None:
        if len(shapes[0]) < 2 or entry.part >= shapes[0][0]:
            raise refuse(f"it is {list(shapes[0])}, and slice {entry.part} of it is needed")
        shape = shapes[0][1:]
    elif len(parts) > 1:
        shape = entry.join.shape(shapes)
    if shape is None:
        raise refuse(f"{', '.join(map(str, shapes))} don't fit together to {entry.parameter}")
    problem = entry.move.problem(shape)
    if problem:
        raise refuse(f"it is {list(shape)}, and {problem}")
    types = {item.type.name for item in parts}
    first = parts[0].type
    quantized = any(not item.type.plain for item in parts)
    packed = quantized and entry.move.packed and len(shape) > 1 and entry.part is None
    if quantized and not packed and len(shape) == 1 and not entry.move.plain:
        raise refuse(f"it is {first.name}, and a vector that is moved must be plain")
    if packed and len(types) > 1:
        packed = False
        cause = f"it is made of {' and '.join(sorted(types))}, which don't join"
        fix = "quantize these to one type; it is decoded to float"
        findings.append(codes.MIXED_TYPES(entry.parameter, cause, fix))
    if not packed:
        shape = entry.move.shape(shape)
    plain = {item.type.plain for item in parts}
    kind = first.name if packed else (plain.pop() if len(plain) == 1 else "") or "F32"
    return Parameter(entry, shape, kind, packed)


def shown(value: Any) -> Any:
    """A metadata value as JSON-able data that fits a line: long arrays as their length."""
    if isinstance(value, Array):
        return list(value) if len(value) <= 8 else f"[{len(value)} values]"
    if isinstance(value, str) and len(value) > 120:
        return value[:117] + "..."
    return value
