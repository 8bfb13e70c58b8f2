"""What a model becomes in a GGUF file: tensors, types and shapes, before a weight is read.

Made once per job, from the module tree and the config, and kept in the job's state. The types of
quantized tensors are the plan's business; what is here is where everything goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from quantmill_gguf.architectures import FAMILIES, by_config
from quantmill_gguf.architectures.family import Entry, Family
from quantmill_gguf.types.sizes import BY_NAME

if TYPE_CHECKING:
    from quantmill.job import Job
    from quantmill.targeting.types import ModuleInfo, ParameterInfo

__all__ = ["FLOAT32", "Layout", "Planned", "layout_of", "nbytes"]

FLOAT32: Final = (
    # llama.cpp computes with these in float32, and expects them so.
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight"),
    *("ssm_conv1d.weight", "shortconv.conv.weight", "attn_rel_b.weight"),
)
_PLAIN: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F32"}
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(slots=True)
class Planned:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """The row length last."""
    kept: str
    """ggml's name of the type it has when it is not quantized."""
    parameters: list[str] = field(default_factory=list)
    """Of the model; several are slices along the first axis."""


@dataclass(slots=True)
class Layout:
    """All of a file."""

    family: Family | None
    config: Mapping[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    """By parameter."""
    tensors: dict[str, Planned] = field(default_factory=dict)
    tables: Mapping[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Why it can't be written."""

    def tensor_of(self, parameter: str) -> Planned | None:
        """The tensor that a parameter is in."""
        entry = self.entries.get(parameter)
        return None if entry is None else self.tensors.get(entry.tensor)


def layout_of(job: Job) -> Layout:
    """The layout of a job's model; ``job.architecture`` stands."""
    state = job.state.setdefault("gguf", {})
    if "layout" not in state:
        state["layout"] = _layout(job)
    found: Layout = state["layout"]
    return found


def _layout(job: Job) -> Layout:
    architecture = job.architecture
    assert architecture is not None
    config = dict(architecture.settings) or dict(job.headers.config)
    family = by_config(config)
    if family is None:
        known = ", ".join(sorted({name for item in FAMILIES for name in item.model_types}))
        cause = f"no architecture of llama.cpp is known for {config.get('model_type')!r:.60}"
        return Layout(None, config, problems=[f"{cause}; known are {known}"])
    found = Layout(family, config)
    entries = {item.parameter: item for item in family.entries(config)}
    tied = architecture.tied
    for module in architecture.modules:
        for local, parameter in module.parameters.items():
            quantized = job.prequantized and f"{module.name}.{local}" == parameter.name
            if (not parameter.sources and not quantized) or parameter.name in tied:
                continue
            entry = entries.get(parameter.name)
            if entry is None:
                found.problems.append(f"{parameter.name} has no place in a file of {family.arch}")
                continue
            _add(found, entry, module, parameter, job.dtype)
    if family.needs_head(config) and "output.weight" not in found.tensors:
        found.problems.append("llama.cpp expects an output head of its own, and it has none")
    found.problems.extend(family.problems(config))
    found.tables = family.extra(config)
    return found


def _add(
    found: Layout, entry: Entry, module: ModuleInfo, parameter: ParameterInfo, dtype: str | None
) -> None:
    shape = entry.move.file_shape(tuple(parameter.shape))
    problem = entry.move.problem(shape)
    if problem:
        found.problems.append(f"{parameter.name}: {problem}")
        return
    found.entries[parameter.name] = entry
    there = found.tensors.get(entry.tensor)
    if there is None:
        whole = shape if entry.part is None else (0, *shape)
        kept = _kept(entry.tensor, whole, module, parameter, dtype)
        there = found.tensors[entry.tensor] = Planned(entry.tensor, whole, kept)
    if entry.part is not None:
        there.shape = (there.shape[0] + 1, *there.shape[1:])
    there.parameters.append(parameter.name)


def _kept(
    name: str,
    shape: tuple[int, ...],
    module: ModuleInfo,
    parameter: ParameterInfo,
    dtype: str | None,
) -> str:
    wide = len(shape) < 2 or module.keep_float or name.endswith(FLOAT32)
    if wide or not name.endswith(".weight"):
        return "F32"
    return _DTYPES.get(dtype or "", _PLAIN.get(parameter.dtype, "F32"))


def nbytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor."""
    info = BY_NAME[type_name]
    return math.prod(shape) // info.block * info.size
