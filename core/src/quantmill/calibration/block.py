"""One block of layers with its weights and its real inputs, as a calibrator sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantmill.calibration.staged import run_staged
from quantmill.findings import QuantmillError, declare

if TYPE_CHECKING:
    from quantmill.calibration.replay import Replay
    from quantmill.config import MethodConfig
    from quantmill.forms import Form
    from quantmill.targeting.types import Target

__all__ = ["Block", "Observer"]

NAN_ACTIVATION = declare("QM-CALIB-010", "An activation is NaN or infinite while calibrating")

STAGED_BYTES = 2 << 30
"""Most memory for intermediate results of all batches in one block."""
_KEPT = 12
"""Tensors of the size of the hidden states that a paused batch holds, roughly: residual, norm,
queries, keys, values, rotated copies, a wide MLP's two halves."""

Observer = Callable[[Tensor], None]
"""Gets the input ``[tokens, in]`` of a linear, once per batch."""


class Block:
    """A block on its device, with float weights that a calibrator may change.

    ``module`` computes with whatever its weights hold: after :meth:`put` with the dequantized
    form, so that what is measured next sees the error made so far.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        targets: Sequence[Target],
        configs: Mapping[str, MethodConfig],
        replay: Replay,
    ) -> None:
        self.index = index
        self.name = name
        self.module = module
        self.targets = list(targets)
        self.configs = dict(configs)
        """Config by target name."""
        self.forms: dict[str, Form | None] = {}
        """What :meth:`put` got, by target name; None for what stays float after all."""
        self.losses: dict[str, float] = {}
        """Relative squared output error by target name, where the calibrator measured it."""
        self.changed: dict[str, Tensor] = {}
        """Float parameters that the calibrator changed, by full name."""
        self.finished = False
        """The inputs of the next block are there already, from :meth:`quantize_in_order`."""
        self._replay = replay

    def linear(self, target: Target) -> nn.Module:
        """The float module of a target."""
        return self.model.get_submodule(target.name)

    def weight(self, target: Target) -> Tensor:
        """A target's weight as ``[out, in]``, sharing memory with the module."""
        weight = self.linear(target).get_parameter(target.parameter).data
        return weight.t() if target.transposed else weight

    def put(self, target: Target, form: Form, loss: float | None = None) -> None:
        """Take the form of a target; the module computes with it from now on."""
        weight = self.weight(target)
        weight.copy_(form.dequantize(weight.dtype))
        self.forms[target.name] = form
        if loss is not None:
            self.losses[target.name] = loss

    def change(self, name: str, value: Tensor) -> None:
        """Change a float parameter (full name), here and in what is written."""
        parameter = self.model.get_parameter(name)
        parameter.data.copy_(value)
        self.changed[name] = parameter.data

    def inputs(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of each call of the block, in order."""
        yield from self._replay.calls(self.index)

    @property
    def model(self) -> nn.Module:
        """The whole model; of its blocks only this one has weights."""
        return self._replay.model

    def run_first(self) -> Any:
        """The block's output for the first batch."""
        args, kwargs = next(self.inputs())
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def observe(self, observers: Mapping[str, Observer]) -> None:
        """Run all batches through the block, and give inputs of targets (by name) to observers.

        The run ends early, in each batch, when the last observed target has been reached.
        """
        waiting: set[str] = set()

        def hook(target: str, observer: Observer) -> Any:
            checked = _finite(target, observer)

            def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
                checked(args[0].detach().reshape(-1, args[0].shape[-1]))
                waiting.discard(target)
                if not waiting:
                    raise _Enough

            return seen

        with ExitStack() as stack:
            for name, observer in observers.items():
                module = self.model.get_submodule(name)
                handle = module.register_forward_pre_hook(hook(name, observer))
                stack.callback(handle.remove)
            for args, kwargs in self.inputs():
                # An expert that no token of a batch reaches is never called: the batch just ends.
                waiting.update(observers)
                try:
                    with torch.no_grad():
                        self.module(*args, **kwargs)
                except _Enough:
                    continue

    def quantize_in_order(
        self, observers: Sequence[tuple[str, Observer]], after: Callable[[int], None]
    ) -> None:
        """Give each target (by name, in the order in which they run) its inputs, as the ones
        before it leave them, and call ``after`` with its number once all batches were seen.

        One pass over the block when the batches' intermediate results fit into
        ``STAGED_BYTES``, and one pass per target otherwise.
        """
        hidden = self._replay.hidden or self._replay.first_inputs()
        kept = sum(tensor.numel() * tensor.element_size() for tensor in hidden) * _KEPT
        if kept > STAGED_BYTES or self.module is self.model:
            for number, (name, observer) in enumerate(observers):
                self.observe({name: observer})
                after(number)
            return

        def call(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Callable[[], Any]:
            args, kwargs = arguments
            return lambda: self.module(*args, **kwargs)

        stops = [
            (self.model.get_submodule(name), _finite(name, observer))
            for name, observer in observers
        ]
        outputs = run_staged([call(item) for item in self.inputs()], stops, after)
        self._replay.take(self.index, outputs)
        self.finished = True

    @contextmanager
    def weights(self, changes: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with other weights (full parameter names) for a while."""
        model = self.model
        before = {name: model.get_parameter(name).data for name in changes}
        try:
            for name, value in changes.items():
                model.get_parameter(name).data = value
            yield
        finally:
            for name, value in before.items():
                model.get_parameter(name).data = value

    def call_order(self) -> list[list[Target]]:
        """Targets in the order in which they run, those that share one input together."""
        by_name = {target.name: target for target in self.targets}
        order: list[tuple[int, list[Target]]] = []

        def hook(target: Target) -> Any:
            def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
                key = id(args[0]) if args[0]._base is None else id(args[0]._base)
                alive.append(args[0])
                for other, members in order:
                    if other == key:
                        members.append(target)
                        return
                order.append((key, [target]))

            return seen

        alive: list[Tensor] = []  # an id is only good while its object lives
        with ExitStack() as stack:
            for name, target in by_name.items():
                module = self.model.get_submodule(name)
                handle = module.register_forward_pre_hook(hook(target))
                stack.callback(handle.remove)
            self.run_first()
        found = [_distinct(members) for _, members in order]
        reached = {target.name for members in found for target in members}
        rest = [[target] for target in self.targets if target.name not in reached]
        return found + rest


def _finite(name: str, observer: Observer) -> Observer:
    """An observer that refuses NaN and infinity."""

    def checked(inputs: Tensor) -> None:
        # A sum is not finite if any of its parts is not: one pass, no temporary.
        if not bool(torch.isfinite(inputs.sum(dtype=torch.float32))) and not bool(
            torch.isfinite(inputs).all()
        ):
            raise QuantmillError(
                NAN_ACTIVATION(
                    name,
                    "its input is NaN or infinite",
                    "use a dtype of wider range (--dtype float32), or other data",
                )
            )
        observer(inputs)

    return checked


def _distinct(targets: Sequence[Target]) -> list[Target]:
    return list({target.name: target for target in targets}.values())


class _Enough(Exception):
    """Every observed target of a batch has been seen."""
