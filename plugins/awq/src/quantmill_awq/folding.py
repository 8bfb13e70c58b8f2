"""Where the inverse of a scale can go: found by running a block, not by knowing its class.

AWQ multiplies the columns of a linear by ``s``; for the model to stay the same, what gives the
linear its input must be divided by ``s``. Two kinds of givers are looked for. A *norm* gives its
very output tensor, and dividing its weight (or one plus its weight) divides that output. A
*linear* gives through operations in between (the product of a gated MLP, attention over values):
its rows are scaled by distinct random factors, and if each input channel of the next linear
follows exactly one of them, that is the map. Either is only used when it holds numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.calibration.block import Block
from quantmill.targeting.types import Target

__all__ = ["Fold", "find_fold"]

_TOLERANCE = 0.02
_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Fold:
    """A giver of some linears' input."""

    module: str
    """Full name of the norm or linear."""
    kind: str
    """``norm`` (weight), ``shifted`` (one plus weight) or ``linear`` (rows)."""
    channels: Tensor
    """int64 ``[in]``: the giver's channel that each input channel follows."""

    def to_data(self) -> list[Any]:
        """JSON-able data."""
        return [self.module, self.kind, self.channels.tolist()]

    @classmethod
    def from_data(cls, data: Sequence[Any], device: torch.device) -> Fold:
        """What :meth:`to_data` gave."""
        module, kind, channels = data
        return cls(module, kind, torch.tensor(channels, dtype=torch.int64, device=device))

    def reduce(self, scale: Tensor) -> Tensor:
        """One scale per giver's channel, spread back over the inputs that follow it: ``[in]``."""
        count = int(self.channels.max()) + 1
        total = torch.zeros(count, device=scale.device).scatter_add_(0, self.channels, scale.log())
        members = torch.zeros(count, device=scale.device).scatter_add_(
            0, self.channels, torch.ones_like(scale)
        )
        return (total / members.clamp(min=1)).exp()[self.channels]

    def changes(self, module: nn.Module, scale: Tensor) -> dict[str, Tensor]:
        """New values of the giver's parameters (local names) with its output divided by
        ``scale [in]``, which must be one that :meth:`reduce` gave."""
        per_channel = torch.ones(
            int(self.channels.max()) + 1, device=scale.device, dtype=torch.float32
        )
        per_channel[self.channels] = scale
        found: dict[str, Tensor] = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = parameter.data.to(torch.float32)
            rows = per_channel if value.shape[0] == per_channel.numel() else None
            if rows is None:
                rows = torch.ones(value.shape[0], device=scale.device)
                rows[: per_channel.numel()] = per_channel
            if self.kind == "shifted" and name == "weight":
                value = (value + 1) / rows - 1
            elif value.ndim == 2:
                value = value / rows.unsqueeze(1)
            else:
                value = value / rows
            found[name] = value.to(parameter.dtype)
        return found


def find_fold(block: Block | _Expert, group: Sequence[Target]) -> Fold | None:
    """The giver of the input that ``group`` shares, or None when there is none to be trusted.

    Nothing but the group may read that input, or the rest would see it divided too.
    """
    if group[0].module.parts:
        return find_fold(_Expert(block, group[0]), [_alone(target) for target in group])
    inside = _Trace(block, group)
    inside.run()
    if inside.others:
        return None
    if inside.giver is not None:
        return _norm(block, inside.giver, group)
    width = group[0].in_features
    for name in reversed(inside.before):
        module = block.model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or width % weight.shape[0]:
            continue
        found = _linear(block, name, group)
        if found is not None:
            return found
    return None


class _Expert:
    """One expert of a mixture in place of its block: no change of a weight sends a token to
    another expert here, and a run costs next to nothing."""

    def __init__(self, block: Block | _Expert, target: Target) -> None:
        part = target.module.parts["weight"]
        self.name = f"{part.module}.{part.expert}"
        self.model: nn.Module = block.model
        self.weights: Callable[..., Any] = block.weights
        self.weight: Callable[[Target], Tensor] = block.weight
        self._owner: Any = block.model.get_submodule(part.module)
        self._expert = part.expert
        self.module: nn.Module = block.model.get_submodule(self.name)

    def run_first(self) -> Any:
        """The expert's output for random inputs."""
        first = next(iter(self.module.children()))
        assert isinstance(first, nn.Linear)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(_TOKENS, first.in_features, generator=generator)
        with torch.no_grad():
            return self._owner.run_expert(self._expert, rows.to(first.weight))


def _alone(target: Target) -> Target:
    return replace(target, module=replace(target.module, parts={}))


class _Trace:
    """One run of the first batch: who gives the group's input, who else reads it."""

    def __init__(self, block: Block | _Expert, group: Sequence[Target]) -> None:
        self.block = block
        self.names = {target.name for target in group}
        self.giver: str | None = None
        self.others: list[str] = []
        self.before: list[str] = []
        self._given: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self._wanted: int | None = None

    def run(self) -> None:
        """Fill the fields."""
        readers: list[tuple[str, int]] = []
        order: list[str] = []

        def before(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                order.append(name)
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Tensor):
                        self._alive.append(value)
                        readers.append((name, id(value)))

            return hook

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    self._alive.append(output)
                    self._given[id(output)] = name

            return hook

        prefix = f"{self.block.name}." if self.block.name else ""
        with ExitStack() as stack:
            for local, module in self.block.module.named_modules():
                if local and not any(True for _ in module.children()):
                    name = prefix + local
                    handles = (
                        module.register_forward_pre_hook(before(name), with_kwargs=True),
                        module.register_forward_hook(after(name)),
                    )
                    for handle in handles:
                        stack.callback(handle.remove)
            self.block.run_first()
        wanted = next((value for name, value in readers if name in self.names), None)
        if wanted is None:
            return
        self.giver = self._given.get(wanted)
        self.others = [n for n, value in readers if value == wanted and n not in self.names]
        place = min(order.index(name) for name in self.names if name in order)
        self.before = order[:place]


def _input_of(block: Block | _Expert, name: str) -> Tensor:
    """Input ``[tokens, in]`` of a linear in a run of the first batch."""
    seen: list[Tensor] = []
    module = block.model.get_submodule(name)
    handle = module.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
    )
    try:
        block.run_first()
    finally:
        handle.remove()
    return seen[0]


def _norm(block: Block | _Expert, name: str, group: Sequence[Target]) -> Fold | None:
    module = block.model.get_submodule(name)
    weight = getattr(module, "weight", None)
    width = group[0].in_features
    device = block.weight(group[0]).device
    channels = torch.arange(width, device=device)
    if isinstance(module, nn.Linear):
        found = Fold(name, "linear", channels)
        kinds = [found] if module.out_features == width else []
    elif isinstance(weight, Tensor) and weight.shape == (width,):
        kinds = [Fold(name, "norm", channels), Fold(name, "shifted", channels)]
    else:
        return None
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(width, generator=generator) * 1.5 + 0.5).to(device)
    return next((fold for fold in kinds if _holds(block, fold, group, scale)), None)


def _holds(block: Block | _Expert, fold: Fold, group: Sequence[Target], scale: Tensor) -> bool:
    """Whether folding ``scale`` into the giver divides the group's input by it."""
    scale = fold.reduce(scale)
    before = _input_of(block, group[0].name)
    module = block.model.get_submodule(fold.module)
    changed = {f"{fold.module}.{k}": v for k, v in fold.changes(module, scale).items()}
    with block.weights(changed):
        after = _input_of(block, group[0].name)
    expected = before / scale
    error = (after - expected).norm() / expected.norm().clamp(min=1e-30)
    return bool(error < _TOLERANCE)


def _linear(block: Block | _Expert, name: str, group: Sequence[Target]) -> Fold | None:
    """The map of a linear's rows to the group's input channels, if each follows one row."""
    module: Any = block.model.get_submodule(name)
    rows = module.weight.shape[0]
    device = module.weight.device
    before = _input_of(block, group[0].name)
    follows = torch.full((before.shape[1],), -1, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(0)
    # Two digits in base ceil(sqrt(rows)) tell the rows apart: factors stay well separated.
    base = max(2, int(rows**0.5) + 1)
    mixed = torch.randperm(rows, generator=generator).to(device)
    digits = []
    for divisor in (1, base):
        digit = (mixed // divisor) % base
        factor = 1.0 + digit.float() / (base - 1)
        ratio = _ratio(block, module, name, factor, before, group)
        if ratio is None:
            return None
        digits.append(((ratio - 1.0) * (base - 1)).round().clamp(0, base - 1).to(torch.int64))
    codes = digits[0] + digits[1] * base
    where = torch.full((base * base,), -1, dtype=torch.int64, device=device)
    where[mixed] = torch.arange(rows, device=device)
    follows = where[codes]
    if bool((follows < 0).any()) or follows.unique().numel() != rows:
        return None
    fold = Fold(name, "linear", follows)
    scale = torch.rand(before.shape[1], generator=generator).to(device) * 1.5 + 0.5
    return fold if _holds(block, fold, group, scale) else None


def _ratio(
    block: Block | _Expert,
    module: Any,
    name: str,
    factor: Tensor,
    before: Tensor,
    group: Sequence[Target],
) -> Tensor | None:
    """How much each input channel of the group grows with the rows of ``module``; None when it
    does not grow by one factor for all tokens."""
    changes = {f"{name}.weight": (module.weight.data.float() * factor.unsqueeze(1))}
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        changes[f"{name}.bias"] = bias.data.float() * factor
    typed = {key: value.to(module.weight.dtype) for key, value in changes.items()}
    with block.weights(typed):
        after = _input_of(block, group[0].name)
    count = min(_TOKENS, before.shape[0])
    energy = before[:count].square().sum(0).clamp(min=1e-20)
    ratio: Tensor = (after[:count] * before[:count]).sum(0) / energy
    rest = (after[:count] - ratio * before[:count]).norm() / after[:count].norm()
    return ratio if bool(rest < _TOLERANCE) else None
