"""Checkpoint names to parameter names, through the conversions that transformers declares.

Version 5 of transformers renames tensors of older checkpoints and fuses some (experts stacked
into one parameter). The rules are taken from the library itself; here they are only applied, so
that any tensor is read when it is needed and not before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantmill.checkpoint.reader import TensorReader

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Conversion", "NameMap", "map_names"]


@dataclass(slots=True)
class Conversion:
    """Several checkpoint tensors that become one or more parameters."""

    converter: Any
    key: str
    """The parameter name that all its sources rename to."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Checkpoint name and the converter's pattern it matched, in natural order."""
    results: dict[str, Tensor] = field(default_factory=dict)

    def outputs(self) -> list[str]:
        """Parameter names it makes."""
        targets = list(self.converter.target_patterns)
        first = _plain(targets[0])
        return [self.key] + [self.key.replace(first, _plain(item), 1) for item in targets[1:]]

    def run(self, name: str, model: nn.Module, reader: TensorReader) -> Tensor:
        """The tensor of parameter ``name``; others of the same conversion wait for their turn."""
        if name not in self.results:
            work = self.converter.copy(
                self.converter._original_source_patterns,
                self.converter._original_target_patterns,
                operations=self.converter.operations,
            )
            for source, pattern in self.sources:
                work.add_tensor(self.key, source, pattern, reader.tensor(source))
            made = work.convert(self.key, model=model, config=model.config)
            self.results = {
                key: value[0] if isinstance(value, list) else value for key, value in made.items()
            }
        return self.results.pop(name)


@dataclass(slots=True)
class NameMap:
    """For each parameter: the one tensor it is read from, or the conversion that makes it."""

    plain: dict[str, str] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    prefixes: dict[str, str] = field(default_factory=dict)
    """Module name in the model to its name in the checkpoint, where quantized tensors lie."""

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoint tensors of a parameter."""
        if name in self.plain:
            return (self.plain[name],)
        if name in self.conversions:
            return tuple(source for source, _ in self.conversions[name].sources)
        return ()


def _plain(pattern: str) -> str:
    return re.sub(r"\\\d|[\^$]", "", pattern)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def map_names(model: nn.Module, names: Iterable[str], shapes: Mapping[str, Any]) -> NameMap:
    """Map every checkpoint name. ``shapes`` is the model's meta state dict."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    result = NameMap()
    groups: dict[str, Conversion] = {}
    for name in sorted(names, key=_natural):
        key, pattern = (
            rename_source_key(name, renamings, converters, model.base_model_prefix, dict(shapes))
            if (renamings or converters or name not in shapes)
            else (name, None)
        )
        if pattern is not None:
            group = groups.setdefault(key, Conversion(by_pattern[pattern], key))
            group.sources.append((name, pattern))
            continue
        if key in shapes:
            result.plain[key] = name
        else:
            result.unused.append(name)
    for group in groups.values():
        outputs = group.outputs()
        if any(item in shapes for item in outputs):
            for item in outputs:
                result.conversions[item] = group
        else:
            result.unused.extend(source for source, _ in group.sources)
    return result
