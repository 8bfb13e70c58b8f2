r"""What each choice of each target costs: KL divergence per token of the whole model.

**The estimate.** To second order, a change ``d = (W' - W) x`` of a linear's output at one token
changes the model's distribution by the KL divergence ``E[(g . d)^2] / 2``, where ``g`` is the
gradient of the log-likelihood of the tokens that the model itself would draw: the Fisher
information takes the place of the Hessian. Changes at different tokens are taken as independent.
``x`` and ``g`` of all targets come from one forward and one backward pass of the float model, block
by block; a choice then costs one product with its error.

**The measurement.** Each choice is put into all targets at once, and the KL divergence of the
model's output is measured: the choice's estimates are scaled to sum up to that, for large errors go
beyond second order. Some pairs of target and choice are put into the float model one at a time, and
the estimate is judged by their correlation.

Source: the Fisher information as the second derivative of KL divergence, S. Amari, *Natural
Gradient Works Efficiently in Learning*, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.budget.lanes import (
    Lane,
    Lanes,
    Weight,
    call_block,
    hidden_of,
    logits_of,
    with_hidden,
)
from quantmill.job import Job
from quantmill.stages.quantize import open_reader
from quantmill.streaming import StreamedModel
from quantmill.targeting.types import Target

__all__ = ["Pair", "Sensitivity", "correlation"]

Pair = tuple[str, str]
"""A target's name and the label of a choice."""
Tell = Callable[[int, int, str], None]


_LANES_BYTES = 1 << 30
"""Most bytes of hidden states of the lanes of one pass."""


@dataclass(slots=True)
class _Seen:
    """Inputs and output gradients of a target, one pair per batch."""

    inputs: list[Tensor]
    gradients: list[Tensor]


class Sensitivity:
    """Estimates and measurements over the same batches of tokens."""

    def __init__(
        self,
        job: Job,
        batches: Sequence[Tensor],
        targets: Sequence[Target],
        labels: Sequence[str],
        weight: Weight,
        folder: Path,
        *,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> None:
        """Args:
        job: planned; its targets are modules of their own, and get their float weights.
        batches: token ids, int64 ``[n, length]`` each.
        targets: of linears.
        labels: the choices.
        weight: what a choice makes of a target.
        folder: for the hidden states between blocks.
        seed: of the tokens that the model draws.
        tell: progress, in blocks.
        """
        self.job, self.batches, self.folder = job, batches, folder
        self.targets = {item.name: item for item in targets}
        self.labels, self.weight, self.tell = labels, weight, tell
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = sum(batch.numel() for batch in batches)
        self.estimated: dict[Pair, float] = {}
        self.measured: dict[Pair, float] = {}
        self.alone: dict[str, float] = {}
        """KL divergence per token with one choice for all targets."""

    def run(self, measure: Sequence[Pair], windows: int) -> None:
        """Estimate all pairs, and measure some, and each choice alone, on the first ``windows``
        batches."""
        with open_reader(self.job.headers, self.job.device) as reader:
            model = StreamedModel(self.job, reader, self.batches, plain=True)
            model.model.requires_grad_(False)
            hidden = self._forward(model, self._lanes([], 0), "forward", 2, store=True)
            self._backward(model, hidden)
        pairs = {pair: Lane({pair[0]: pair[1]}) for pair in measure}
        alone = {label: Lane(dict.fromkeys(self.targets, label)) for label in self.labels}
        self.measure([*pairs.values(), *alone.values()], windows)
        self.measured = {pair: lane.divergence for pair, lane in pairs.items()}
        self.alone = {label: lane.divergence for label, lane in alone.items()}

    def measure(self, lanes: Sequence[Lane], windows: int) -> None:
        """Measure lanes on the first ``windows`` batches, in as many passes as memory asks for."""
        windows = min(windows, len(self.batches))
        done = 0
        while done < len(lanes):
            with open_reader(self.job.headers, self.job.device) as reader:
                model = StreamedModel(self.job, reader, self.batches[:windows], plain=True)
                size = sum(state.nbytes for state in model.replay.first_inputs())
                part = lanes[done : done + max(1, _LANES_BYTES // max(1, size))]
                self._forward(model, self._lanes(part, windows), "mixtures", 1)
            done += len(part)

    def scales(self) -> dict[str, float]:
        """What to multiply a choice's estimates by: measured over estimated, of it alone."""
        found = {}
        for label, value in self.alone.items():
            estimated = sum(self.estimated[name, label] for name in self.targets)
            found[label] = value / estimated if estimated > 0 and value > 0 else 1.0
        return found

    def _lanes(self, lanes: Sequence[Lane], windows: int) -> Lanes:
        return Lanes(lanes, self.targets, self.weight, windows)

    def _say(self, done: int, total: int, what: str) -> None:
        if self.tell is not None:
            self.tell(done, total, what)

    def _forward(
        self, model: StreamedModel, lanes: Lanes, what: str, passes: int, *, store: bool = False
    ) -> list[Tensor]:
        """The float model's hidden states after the last block, with lanes carried along. What
        each block was called with is stored on the disk where the backward pass wants it."""
        replay, total = model.replay, passes * model.count
        for index in range(model.count):
            self._say(index, total, f"{what}, block {index}")
            with model.block(index) as block, torch.no_grad():
                calls = list(replay.calls(index))
                lanes.block(model.model, block, f"{model.inner}{index}.", calls)
                if store:
                    self._store(index, [hidden_of(call) for call in calls])
                replay.take(index, [block(*args, **kwargs) for args, kwargs in calls])
        lanes.end(model, replay.hidden)
        return replay.hidden

    def _backward(self, model: StreamedModel, last: list[Tensor]) -> None:
        """Gradients from the output back to the first block."""
        count = model.count
        outside = [name for name in self.targets if not name.startswith(model.inner)]
        with self._observed(model.model, outside) as seen:
            gradients = [self._tail(model, number, hidden) for number, hidden in enumerate(last)]
        self._estimate(model.model, seen)
        for index in reversed(range(count)):
            self._say(2 * count - 1 - index, 2 * count, f"backward, block {index}")
            inside = f"{model.inner}{index}."
            names = [name for name in self.targets if name.startswith(inside)]
            with model.block(index) as block:
                block.requires_grad_(False)
                model.replay.hidden = self._stored(index, len(last))
                with self._observed(model.model, names) as seen:
                    for number, call in enumerate(list(model.replay.calls(index))):
                        leaf = hidden_of(call).detach().requires_grad_(True)
                        with torch.enable_grad():
                            call_block(block, with_hidden(call, leaf)).backward(gradients[number])  # type: ignore[no-untyped-call]
                        assert leaf.grad is not None
                        gradients[number] = leaf.grad
                self._estimate(model.model, seen)
        self._say(2 * count, 2 * count, "done")

    def _tail(self, model: StreamedModel, number: int, hidden: Tensor) -> Tensor:
        """The gradient at the last block's output, for tokens that the model draws."""
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(model.replay.output(number, leaf)).float()
            flat = logits.reshape(-1, logits.shape[-1])
            drawn = torch.multinomial(
                flat.detach().softmax(-1).cpu(), 1, generator=self.generator
            ).to(flat.device)
            loss = nn.functional.cross_entropy(flat, drawn[:, 0], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad

    @contextmanager
    def _observed(self, model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Seen]]:
        seen = {name: _Seen([], []) for name in names}

        def hook(name: str) -> Any:
            def called(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                if not output.requires_grad:
                    return
                seen[name].inputs.append(args[0].detach())
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad: seen[name].gradients.append(grad.detach())
                )

            return called

        with ExitStack() as stack:
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(hook(name))
                stack.callback(handle.remove)
            yield seen

    def _estimate(self, model: nn.Module, seen: dict[str, _Seen]) -> None:
        for name, item in seen.items():
            target = self.targets[name]
            weight = model.get_submodule(name).get_parameter(target.parameter).data
            exact = (weight.t() if target.transposed else weight).float()
            for label in self.labels:
                error = self.weight(target, label).to(exact.device) - exact
                total = 0.0
                for x, g in zip(item.inputs, item.gradients, strict=True):
                    rows = x.reshape(-1, x.shape[-1]).float() @ error.t()
                    along = (rows * g.reshape(rows.shape).float()).sum(-1)
                    total += float(along.square().sum(dtype=torch.float64))
                self.estimated[name, label] = total / (2 * self.tokens)
            item.inputs.clear()
            item.gradients.clear()

    def _store(self, index: int, states: list[Tensor]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {str(n): state.detach().contiguous().clone() for n, state in enumerate(states)},
            self.folder / f"hidden-{index}.safetensors",
        )

    def _stored(self, index: int, count: int) -> list[Tensor]:
        from safetensors.torch import load_file

        path = self.folder / f"hidden-{index}.safetensors"
        found = load_file(path, device=self.job.device)
        path.unlink()
        return [found[str(number)] for number in range(count)]


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation of the logarithms; None for fewer than three positive pairs."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
    if len(pairs) < 3:
        return None
    return float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).t())[0, 1])
