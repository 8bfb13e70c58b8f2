"""What a GGUF file is to transformers: the config, and what each parameter is made of.

The families are in :mod:`quantmill_gguf.architectures`.
"""

from __future__ import annotations

import itertools
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
    """ggml's name of its type: of the blocks if it is packed, of the floats if not."""
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
    left = _most(tensors)
    for entry in itertools.chain(family.older(config, tensors), family.entries(config)):
        left -= 1
        if left < 0:
            # A count in the metadata is absurd: do not count to it.
            cause = (
                f"its metadata speaks of more layers or experts than {len(tensors)} tensors hold"
            )
            raise QuantmillError(codes.BAD_VALUE(file, cause, _AGAIN))
        tensor = tensors.get(entry.tensor)
        if tensor is None or entry.parameter in parameters:
            continue
        used.add(entry.tensor)
        parameters[entry.parameter] = _parameter(entry, tensor, file)
    rest = [item for item in tensors if item not in used]
    return HfModel(config, parameters, rest)


def _most(tensors: Mapping[str, GgufTensor]) -> int:
    """More parameters than these tensors can be."""
    slices = sum(
        min(item.shape[0], item.numel)
        for name, item in tensors.items()
        if len(item.shape) > 1 and ("_exps." in name or "_norm." in name)
    )
    return 4096 + 64 * len(tensors) + 8 * slices


def _parameter(entry: Entry, tensor: GgufTensor, file: str) -> Parameter:
    def refuse(cause: str) -> QuantmillError:
        where = f"{file}: {entry.tensor}"
        return QuantmillError(codes.BAD_TENSOR(where, cause, _AGAIN))

    shape = tensor.shape
    if entry.part is not None:
        if len(shape) < 2 or entry.part >= shape[0]:
            raise refuse(f"it is {list(shape)}, and slice {entry.part} of it is needed")
        shape = shape[1:]
    problem = entry.move.problem(shape)
    if 0 in shape:
        problem = "a weight has elements"
    if problem:
        raise refuse(f"it is {list(shape)}, and {problem}")
    quantized = not tensor.type.plain
    packed = quantized and entry.move.keeps(tensor.type.block) and len(shape) == 2
    if quantized and not packed and len(shape) < 2 and not entry.move.plain:
        raise refuse(f"it is {tensor.type.name}, and a vector that is moved must be plain")
    if not packed:
        shape = entry.move.shape(shape)
    kind = tensor.type.name if packed else tensor.type.plain or "F32"
    return Parameter(entry, shape, kind, packed)


def shown(value: Any) -> Any:
    """A metadata value as JSON-able data that fits a line: long arrays as their length."""
    if isinstance(value, Array):
        short = len(value) <= 8 and value.stop - value.start <= 1024
        return list(value) if short else f"[{len(value)} values]"
    if isinstance(value, str) and len(value) > 120:
        return value[:117] + "..."
    return value
