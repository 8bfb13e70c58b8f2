r"""What each choice of each target costs: KL divergence per token of the whole model.

**The estimate.** To second order, a change ``d = (W' - W) x`` of a linear's output at one token
changes the model's distribution by the KL divergence ``E[(g . d)^2] / 2``, where ``g`` is the
gradient of the log-likelihood of the tokens that the model itself would draw: the Fisher
information takes the place of the Hessian. Changes at different tokens are taken as independent.
``x`` and ``g`` of all targets come from one forward and one backward pass of the float model, block
by block; a choice then costs one product with its error.

**The measurement.** Some pairs of target and choice are put into the float model one at a time, and
the KL divergence of its output is measured. The estimate is judged by their correlation, and each
method's estimates are scaled to what was measured of it.

Source: the Fisher information as the second derivative of KL divergence, S. Amari, *Natural
Gradient Works Efficiently in Learning*, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.job import Job
from quantmill.stages.quantize import open_reader
from quantmill.streaming import StreamedModel
from quantmill.targeting.types import Target

__all__ = ["Pair", "Sensitivity", "correlation", "scales"]

Pair = tuple[str, str]
"""A target's name and the label of a choice."""
Weight = Callable[[Target, str], Tensor]
"""The float32 weight ``[out, in]`` that a choice gives a target."""
Tell = Callable[[int, int, str], None]


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

    def run(self, measure: Sequence[Pair], windows: int) -> None:
        """Estimate all pairs, and measure some on the first ``windows`` batches."""
        with open_reader(self.job.headers, self.job.device) as reader:
            model = StreamedModel(self.job, reader, self.batches, plain=True)
            model.model.requires_grad_(False)
            hidden = self._forward(model, list(measure), windows)
            self._backward(model, hidden)

    def _say(self, done: int, total: int, what: str) -> None:
        if self.tell is not None:
            self.tell(done, total, what)

    def _forward(self, model: StreamedModel, measure: list[Pair], windows: int) -> list[Tensor]:
        """Keeps the inputs of every block on the disk; carries measured pairs along."""
        replay, few = model.replay, range(min(windows, len(self.batches)))
        carried: dict[Pair, list[Tensor]] = {}
        for index in range(model.count):
            self._say(index, 2 * model.count, f"forward, block {index}")
            with model.block(index) as block, torch.no_grad():
                calls = list(replay.calls(index))
                inside = f"{model.inner}{index}."
                outputs = [block(*args, **kwargs) for args, kwargs in calls]
                for states in carried.values():
                    states[:] = [_call(block, _with(calls[n], states[n])) for n in few]
                for pair in [item for item in measure if item[0].startswith(inside)]:
                    with self._changed(model.model, pair):
                        carried[pair] = [_call(block, calls[n]) for n in few]
                self._store(index, [_hidden_of(call) for call in calls])
                replay.take(index, outputs)
        last = replay.hidden
        for pair, states in carried.items():
            self.measured[pair] = self._divergence(model, last, states, few)
        outside = [item for item in measure if item not in carried]
        for pair in outside:
            with self._changed(model.model, pair):
                changed = [_logits(replay.output(n, last[n])) for n in few]
            self.measured[pair] = self._mean_kl(
                ((_logits(replay.output(n, last[n])), changed[n]) for n in few), few
            )
        return last

    def _divergence(
        self, model: StreamedModel, last: list[Tensor], states: list[Tensor], few: range
    ) -> float:
        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for number in few:
                with torch.no_grad():
                    yield (
                        _logits(model.replay.output(number, last[number])),
                        _logits(model.replay.output(number, states[number])),
                    )

        return self._mean_kl(pairs(), few)

    def _mean_kl(self, pairs: Iterator[tuple[Tensor, Tensor]], few: range) -> float:
        total = 0.0
        for exact, changed in pairs:
            log_p, log_q = exact.float().log_softmax(-1), changed.float().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        return total / sum(self.batches[number].numel() for number in few)

    @contextmanager
    def _changed(self, model: nn.Module, pair: Pair) -> Iterator[None]:
        target = self.targets[pair[0]]
        weight = model.get_submodule(target.name).get_parameter(target.parameter)
        before = weight.data
        made = self.weight(target, pair[1])
        weight.data = (made.t() if target.transposed else made).to(before.dtype).contiguous()
        try:
            yield
        finally:
            weight.data = before

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
                        leaf = _hidden_of(call).detach().requires_grad_(True)
                        with torch.enable_grad():
                            _call(block, _with(call, leaf)).backward(gradients[number])  # type: ignore[no-untyped-call]
                        assert leaf.grad is not None
                        gradients[number] = leaf.grad
                self._estimate(model.model, seen)
        self._say(2 * count, 2 * count, "done")

    def _tail(self, model: StreamedModel, number: int, hidden: Tensor) -> Tensor:
        """The gradient at the last block's output, for tokens that the model draws."""
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = _logits(model.replay.output(number, leaf)).float()
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


def scales(estimated: Mapping[Pair, float], measured: Mapping[Pair, float]) -> dict[str, float]:
    """What to multiply a method's estimates by: the geometric mean of measured over estimated, for
    methods with at least two measured pairs. Large errors go beyond second order."""
    ratios: dict[str, list[float]] = {}
    for pair, value in measured.items():
        if value > 0 and estimated[pair] > 0:
            ratios.setdefault(pair[1], []).append(math.log(value / estimated[pair]))
    return {
        label: math.exp(sum(items) / len(items))
        for label, items in ratios.items()
        if len(items) > 1
    }


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _call(block: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    output = block(*args, **kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _hidden_of(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _with(
    call: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = call
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
