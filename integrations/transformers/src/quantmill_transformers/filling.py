"""What of a model the checkpoint fills, and what it has beside."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantmill.architecture import SHAPE_MISMATCH, missing_tensor, other_shape, unused_tensor
from quantmill.findings import Finding, Severity, declare
from quantmill.targeting.types import FLOAT_DTYPES
from quantmill_transformers.names import Conversion

if TYPE_CHECKING:
    from quantmill_transformers.architecture import TransformersArchitecture

__all__ = ["NEW_PARAMETER", "compare", "fresh_parameters"]

CANT_CONVERT = declare("QM-TF-002", "Tensors of an older layout can't be converted")
NEW_PARAMETER = declare(
    "QM-TF-005", "A parameter is not in the checkpoint and was initialised anew", Severity.WARNING
)


def compare(model: TransformersArchitecture) -> list[Finding]:
    """What does not fit, of the checkpoint and of the model that its config asks for."""
    quantized = bool(model.headers.config.get("quantization_config"))
    found = [*_unconverted(model, quantized), *_unfilled(model, quantized)]
    allowed = [*(model.skeleton._keys_to_ignore_on_load_unexpected or ())]
    for buffer in ("rotary_emb.inv_freq", "position_ids"):
        # They were stored once and are computed now.
        if any(name.endswith(buffer) for name, _ in model.skeleton.named_buffers()):
            allowed.append(rf"(^|\.){re.escape(buffer)}$")
    found.extend(_surplus(model))
    for name in model.names.unused:
        known = any(re.search(item, name) for item in allowed)
        if not known and not (quantized and model.names.unused[name]):
            found.append(unused_tensor(name))
    return found


def fresh_parameters(model: TransformersArchitecture) -> frozenset[str]:
    """Parameters that the checkpoint need not have: another class than the one asked for wrote
    it, and it holds nothing of their modules. Layers of one stack are there together."""
    if model.class_name in (model.headers.config.get("architectures") or ()):
        return frozenset()
    there = [name for name in model.shapes if model.names.sources(name)]
    filled = {name.rpartition(".")[0] for name in there} | set(model.names.beside)
    stacks = {match[0] for name in there if (match := re.match(r".*?\.\d+\.", name))}
    stacks = {re.sub(r"\d+\.$", "", stack) for stack in stacks}
    return frozenset(
        name
        for name in model.shapes
        if name.rpartition(".")[0] not in filled
        and name not in model.tied
        and not any(name.startswith(stack) for stack in stacks)
    )


def _unfilled(model: TransformersArchitecture, quantized: bool) -> list[Finding]:
    """Parameters that the checkpoint lacks or holds in another shape."""
    found = []
    ignored = model.skeleton._keys_to_ignore_on_load_missing or ()
    stacked = set(model.experts.stacked())
    wanted_shapes = {
        **{name: tuple(item.shape) for name, item in model.shapes.items()},
        **{
            parameter.name: parameter.shape
            for module in model.modules
            if module.parts
            for parameter in module.parameters.values()
            if parameter.part is None
        },
    }
    for name, wanted in wanted_shapes.items():
        sources = model.names.sources(name)
        if not sources and name in stacked:
            continue  # Its matrices are looked for one by one.
        if name in model.fresh:
            if not any(re.search(item, name) for item in ignored):
                found.append(
                    NEW_PARAMETER(
                        name,
                        f"the checkpoint has nothing of it, {model.class_name} made it anew",
                        "train it, or load the class that the checkpoint is of",
                    )
                )
            continue
        if not sources:
            if name in model.tied or any(re.search(item, name) for item in ignored):
                continue
            if quantized and name.rpartition(".")[0] in model.names.beside:
                continue  # The layout has other names for it (qweight).
            found.append(missing_tensor(name))
            continue
        if name in model.names.plain:
            header = model.headers.tensors[sources[0]]
            stored = tuple(header.shape)
            if quantized and len(wanted) != 1:
                continue  # Codes have the shape that their codec gives them.
        else:
            conversion = model.names.conversions[name]
            if conversion.problem or _is_packed(model, conversion, quantized):
                continue
            stored = conversion.shapes[name]
        if stored != wanted:
            found.append(other_shape(name, stored, wanted))
    return found


def _surplus(model: TransformersArchitecture) -> list[Finding]:
    """Experts that the checkpoint has and the config does not count."""
    found = {}
    for name in model.names.unused:
        match = re.search(r"(?:^|\.)experts\.(\d+)\.", name)
        owner = model.experts.owner(model.names.unused[name] + ".")
        if match and owner and int(match[1]) >= model.experts.stacks[owner].experts:
            count = model.experts.stacks[owner].experts
            found[owner] = SHAPE_MISMATCH(
                owner,
                f"the checkpoint has {name}, and the config has {count} experts",
                "correct config.json, or take the checkpoint that belongs to it",
            )
    return list(found.values())


def _unconverted(model: TransformersArchitecture, quantized: bool) -> list[Finding]:
    found = []
    for conversion in {id(item): item for item in model.names.conversions.values()}.values():
        if _is_packed(model, conversion, quantized):
            cause = "they are quantized one by one, and this version stacks or splits them"
            fix = "quantize the float checkpoint anew"
        elif conversion.problem:
            cause = f"transformers' conversion fails: {conversion.problem}"
            fix = "complete the checkpoint, or update transformers"
        else:
            continue
        source = conversion.sources[0][0]
        more = len(conversion.sources) - 1
        where = source + (f" and {more} more" if more else "")
        found.append(CANT_CONVERT(where, cause, fix))
    return found


def _is_packed(model: TransformersArchitecture, conversion: Conversion, quantized: bool) -> bool:
    return quantized and any(
        model.headers.tensors[source].dtype not in FLOAT_DTYPES for source, _ in conversion.sources
    )
