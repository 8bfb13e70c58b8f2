"""KL divergence of many mixtures from the float model, in one pass over its blocks.

A *lane* is a model in which some targets have the weight that a choice gives them. It follows the
float model until the first block with such a target. Blocks come and go; the hidden states of all
lanes stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.streaming import StreamedModel
from quantmill.targeting.types import Target

__all__ = ["Lane", "Lanes", "Weight", "call_block", "hidden_of", "logits_of", "with_hidden"]

Weight = Callable[[Target, str], Tensor]
"""The float32 weight ``[out, in]`` that a choice gives a target."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class Lane:
    """A mixture, and what is known of it on the way."""

    choices: Mapping[str, str]
    """Label by target; targets without one are float."""
    states: list[Tensor] = field(default_factory=list)
    """Its hidden states, from the first block with a choice on."""
    divergence: float = 0.0
    """KL divergence per token, in the end."""


class Lanes:
    """The lanes of one pass; :meth:`block` is called for each block in turn, then :meth:`end`."""

    def __init__(
        self, lanes: Sequence[Lane], targets: Mapping[str, Target], weight: Weight, windows: int
    ) -> None:
        """Lanes run on the first ``windows`` batches of the model that they are given."""
        self.lanes, self.targets, self.weight, self.windows = lanes, targets, weight, windows

    def block(self, model: nn.Module, block: nn.Module, inside: str, calls: Sequence[Call]) -> None:
        """Advance all lanes over a block, whose names begin with ``inside``; ``calls`` are those
        of the float model."""
        names = [name for name in self.targets if name.startswith(inside)]
        calls = calls[: self.windows]
        for lane in self.lanes:
            if not lane.states and not any(name in lane.choices for name in names):
                continue
            states = lane.states or [hidden_of(call) for call in calls]
            with torch.no_grad(), self._changed(model, lane, names):
                lane.states = [
                    call_block(block, with_hidden(call, state))
                    for call, state in zip(calls, states, strict=True)
                ]

    def end(self, model: StreamedModel, last: Sequence[Tensor]) -> None:
        """Measure all lanes; ``last`` are the float model's states after the last block."""
        tokens = sum(state.shape[:-1].numel() for state in last[: self.windows])
        outside = [name for name in self.targets if not name.startswith(model.inner)]
        totals = [0.0] * len(self.lanes)
        for number in range(self.windows):
            with torch.no_grad():
                exact = logits_of(model.replay.output(number, last[number])).float()
                log_p = exact.log_softmax(-1)
                for index, lane in enumerate(self.lanes):
                    states = lane.states or last
                    with self._changed(model.model, lane, outside):
                        changed = logits_of(model.replay.output(number, states[number]))
                    log_q = changed.float().log_softmax(-1)
                    totals[index] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        for lane, total in zip(self.lanes, totals, strict=True):
            lane.divergence, lane.states = total / tokens, []

    @contextmanager
    def _changed(self, model: nn.Module, lane: Lane, names: Sequence[str]) -> Iterator[None]:
        """The lane's weights in some targets of the model."""
        before: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name in names:
                label = lane.choices.get(name)
                if label is not None:
                    target = self.targets[name]
                    weight = model.get_submodule(name).get_parameter(target.parameter)
                    before.append((weight, weight.data))
                    made = self.weight(target, label)
                    made = made.t() if target.transposed else made
                    weight.data = made.to(weight.dtype).contiguous()
            yield
        finally:
            for weight, data in before:
                weight.data = data


def logits_of(output: Any) -> Tensor:
    """The logits in what a model gives."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def call_block(block: nn.Module, call: Call) -> Tensor:
    """The hidden states that a block gives."""
    args, kwargs = call
    output = block(*args, **kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def hidden_of(call: Call) -> Tensor:
    """The hidden states that a block is called with."""
    args, kwargs = call
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def with_hidden(call: Call, hidden: Tensor) -> Call:
    """The same call with other hidden states."""
    args, kwargs = call
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
