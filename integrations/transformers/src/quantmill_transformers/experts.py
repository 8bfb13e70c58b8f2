"""The experts of transformers' models, which version 5 stacks, as the matrices that files hold.

Which names an expert's matrices have in files (Mixtral's ``w1``, ``w3``, ``w2``) the library's own
table of conversions tells; where it has none, they are ``gate_proj``, ``up_proj``, ``down_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from quantmill.experts import Matrix, Stack, stack_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Experts", "find_experts"]

_EACH = re.compile(r".*\\?\.\*\\?\.(\w+)\\?\.weight\$?")
"""A pattern of all experts' tensors of one name: ``.experts.*.w1.weight``."""


@dataclass(slots=True)
class Experts:
    """Every stack of a model, by the name of its module."""

    stacks: dict[str, Stack] = field(default_factory=dict)
    named: dict[str, tuple[str, int, Matrix]] = field(default_factory=dict)
    """Each matrix by the name it has as a module: owner, number of the expert, matrix."""

    def tensors(self) -> Iterator[str]:
        """Names of all weights and biases, each as a parameter of its matrix's module."""
        for name, (_, _, matrix) in self.named.items():
            yield f"{name}.weight"
            if matrix.bias is not None:
                yield f"{name}.bias"

    def stacked(self) -> Iterator[str]:
        """Full names of all stacked parameters."""
        for owner, stack in self.stacks.items():
            for local in stack.parameters:
                yield f"{owner}.{local}"

    def alone(self, name: str) -> bool:
        """Whether a tensor belongs to one expert, though perhaps to one that there is not."""
        owner = self.owner(name)
        return owner is not None and name[len(owner) + 1 :].partition(".")[0].isdigit()

    def owner(self, name: str) -> str | None:
        """The stacking module that a name lies in."""
        for end in (match.start() for match in re.finditer(r"\.", name)):
            if name[:end] in self.stacks:
                return name[:end]
        return None


def find_experts(model: nn.Module) -> Experts:
    """The stacks of a model on the meta device."""
    found = Experts()
    owners = [(name, part) for name, part in model.named_modules() if stack_of(part) is not None]
    if not owners:
        return found
    converters: list[Any] = [
        item for item in get_model_conversion_mapping(model) if isinstance(item, WeightConverter)
    ]
    for name, part in owners:
        stack = stack_of(part, _leaves(name, part, converters)) or stack_of(part)
        assert stack is not None
        found.stacks[name] = stack
        for expert in range(stack.experts):
            for matrix in stack.matrices:
                found.named[f"{name}.{expert}.{matrix.leaf}"] = (name, expert, matrix)
    return found


def _leaves(owner: str, module: nn.Module, converters: list[Any]) -> Mapping[str, list[str]]:
    """Names of an expert's matrices by stacked parameter, where plain stacking makes it."""
    found: dict[str, list[str]] = {}
    for parameter in module._parameters:
        for item in converters:
            targets = [target.replace("\\", "").rstrip("$") for target in item.target_patterns]
            if not any(f".{owner}.{parameter}".endswith(target) for target in targets):
                continue
            leaves = [_EACH.fullmatch(pattern) for pattern in item.source_patterns]
            plain = all(isinstance(step, MergeModulelist | Concatenate) for step in item.operations)
            if plain and all(leaves):
                found[parameter] = [match[1] for match in leaves if match is not None]
                break
    return found
