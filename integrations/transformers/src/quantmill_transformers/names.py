"""Checkpoint names to parameter names, through the conversions that transformers declares.

Version 5 of transformers renames tensors of older checkpoints and fuses some (experts stacked
into one parameter). The rules are taken from the library itself; here they are only applied, so
that any tensor is read when it is needed and not before. What a conversion gives is found out by
running it on the meta device, with the shapes of the headers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantmill.checkpoint.dtypes import torch_shape
from quantmill.checkpoint.reader import TensorReader, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantmill.checkpoint.headers import TensorHeader
    from quantmill_transformers.experts import Experts

__all__ = ["Conversion", "NameMap", "map_names"]


@dataclass(slots=True)
class Conversion:
    """Several checkpoint tensors that become one or more parameters."""

    converter: Any
    key: str
    """The parameter name that all its sources rename to."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Checkpoint name and the converter's pattern it matched, in natural order."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What it makes: shapes by parameter name."""
    problem: str = ""
    """Why it can't be carried out."""
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def signature(self, headers: Mapping[str, TensorHeader]) -> tuple[Any, ...]:
        """What ``shapes`` depends on, apart from the names."""
        return tuple(
            (part, headers[name].dtype, headers[name].shape) for name, part in self.sources
        )

    def trace(self, model: nn.Module, headers: Mapping[str, TensorHeader]) -> None:
        """Fill ``shapes``, or ``problem``, without reading anything."""
        try:
            made = self._convert(model, lambda name: _abstract(headers[name]))
        except Exception as error:  # noqa: BLE001 the library's operations raise what they like
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        self.shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}

    def run(self, name: str, model: nn.Module, reader: TensorReader) -> Tensor:
        """The tensor of parameter ``name``; others of the same conversion wait for their turn."""
        if name not in self.waiting:
            self.waiting = self._convert(model, reader.tensor)
        return self.waiting.pop(name)

    def _convert(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        work = self.converter.copy(
            self.converter._original_source_patterns,
            self.converter._original_target_patterns,
            operations=self.converter.operations,
        )
        for source, pattern in self.sources:
            work.add_tensor(self.key, source, pattern, read(source))
        made = work.convert(self.key, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


@dataclass(slots=True)
class NameMap:
    """For each parameter: the one tensor it is read from, or the conversion that makes it."""

    plain: dict[str, str] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    """Tensors that are no parameter of the float model, each with the module that has parameters
    it lies beside (scales, packed codes), or an empty string."""
    beside: dict[str, str] = field(default_factory=dict)
    """Those modules, each with its name in the checkpoint."""
    transforms: list[Any] = field(default_factory=list)
    """The library's rules that applied to some name, for saving the model under those names."""

    def sources(self, name: str) -> tuple[str, ...]:
        """Checkpoint tensors of a parameter."""
        if name in self.plain:
            return (self.plain[name],)
        if name in self.conversions:
            return tuple(source for source, _ in self.conversions[name].sources)
        return ()


def _abstract(header: TensorHeader) -> Tensor:
    shape = torch_shape(header.dtype, tuple(header.shape))
    return torch.empty(shape, dtype=torch_dtype(header.dtype, header.name), device="meta")


def _place(name: str, key: str, prefix: str, owners: set[str], result: NameMap) -> None:
    """Find the module that an unknown tensor lies beside."""
    result.unused[name] = ""
    # The class may be the base of the one that wrote the checkpoint, or have it as a part.
    for full in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
        owner = full
        while owner:
            owner = owner.rpartition(".")[0]
            local = full[len(owner) :]
            if owner in owners and name.endswith(local):
                result.unused[name] = owner
                result.beside.setdefault(owner, name.removesuffix(local))
                return


def _within(name: str, owners: Collection[str]) -> bool:
    """Whether a name lies below one of ``owners``."""
    return any(name[:end] in owners for end, char in enumerate(name) if char == ".")


def _current(
    model: Any,
    headers: Mapping[str, TensorHeader],
    shapes: Mapping[str, Any],
    owners: Collection[str],
) -> bool:
    """Whether the names are today's already: every parameter is there under its own, or packed
    below it (``weight.Q4_K``), and all else lies beside one (scales of a quantized weight). The
    library's table of old names, which takes a tenth of a second to make, is not needed then."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    held = {*headers, *(name.rpartition(".")[0] for name in headers), *tied}
    if any(name not in held for name in shapes):
        return False
    return all(name in shapes or _within(name, owners) for name in headers)


def map_names(
    model: Any, headers: Mapping[str, TensorHeader], shapes: Mapping[str, Any], experts: Experts
) -> NameMap:
    """Map every checkpoint name. ``shapes`` is the model's meta state dict.

    A tensor that is the matrix of one expert keeps its own entry in ``plain``: nothing is stacked
    here.
    """
    owners = {item.rpartition(".")[0] for item in shapes} - {""} | experts.named.keys()
    if _current(model, headers, shapes, owners):
        result = NameMap()
        for name in sorted(headers, key=dot_natural_key):
            if name in shapes:
                result.plain[name] = name
            else:
                _place(name, name, model.base_model_prefix, owners, result)
        return result
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    single = dict.fromkeys(experts.tensors(), 1)
    known, prefix = {**shapes, **single}, model.base_model_prefix
    result = NameMap()
    groups: dict[str, Conversion] = {}
    # The library's order: some renamings depend on it, and experts are stacked in it.
    for name in sorted(headers, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if key not in known and name in known:
            key, pattern = rename_source_key(name, [], [], prefix, known)
        if single and pattern is not None:
            # The conversion would stack it.
            alone, _ = rename_source_key(name, renamings, [], prefix, known)
            if experts.alone(alone):
                key, pattern = alone, None
        if key not in known:
            _place(name, key, prefix, owners, result)
        elif pattern is None:
            result.plain[key] = name
        else:
            group = groups.setdefault(key, Conversion(by_pattern[pattern], key))
            group.sources.append((name, pattern))
    traced: dict[Any, tuple[int, ...]] = {}
    for key, group in groups.items():
        # Layers repeat: what stacks to one parameter in one layer does so in the next.
        like = (id(group.converter), tuple(known[key].shape), group.signature(headers))
        if like in traced:
            group.shapes = {key: traced[like]}
        else:
            group.trace(model, headers)
        if set(group.shapes) == {key}:
            traced[like] = group.shapes[key]
        for made in group.shapes or (key,):
            if made in known:
                result.conversions[made] = group
    result.transforms = [item for item in transforms if item.was_used()]
    return result
