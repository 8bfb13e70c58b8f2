"""One block of layers with its weights and its real inputs, as a calibrator sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantmill.calibration.call_order import order_of_calls
from quantmill.calibration.mixture import in_order_of_experts, shrunk
from quantmill.calibration.moments import Moments, lanes_of
from quantmill.calibration.staged import run_staged
from quantmill.findings import QuantmillError, declare
from quantmill.heap import LARGE, give_back
from quantmill.stages.calibrating import STAGED_BYTES, staged_bytes

if TYPE_CHECKING:
    from quantmill.calibration.replay import Replay
    from quantmill.config import MethodConfig
    from quantmill.forms import Form
    from quantmill.kernels import KernelRegistry
    from quantmill.processes import Processes
    from quantmill.targeting.types import Target

__all__ = ["Block", "Observer"]

NAN_ACTIVATION = declare("QM-CALIB-010", "An activation is NaN or infinite while calibrating")

Observer = Callable[[Tensor, int], None]
"""Gets the input ``[tokens, in]`` of a linear and the number of its batch, in order of batches.
Where several processes share the batches, it gets those of its own process."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a block needs of its job: the processes that share the work, and how forms travel."""

    processes: Processes
    kernels: KernelRegistry
    pack: Callable[[Target, Form], dict[str, Tensor]]
    """Tensors that stand for a form."""
    unpack: Callable[[Target, dict[str, Tensor]], Form]
    """The form that they stand for."""
    orders: dict[Any, list[list[str]]] = field(default_factory=dict)
    """Local names of targets in the order in which they run, by the structure of a block."""


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
        share: Share,
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
        self.tokens: dict[str, int] = {}
        """Tokens that the inputs of an expert's matrix came from, by target name."""
        self.changed: dict[str, Tensor] = {}
        """Float parameters that the calibrator changed, by full name."""
        self.exact: dict[str, dict[int, Tensor]] = {}
        """Inputs in the float model, by name of the target that asks for them and number of the
        batch."""
        self.finished = False
        """The inputs of the next block are there already, from :meth:`in_order`."""
        self.wanted = True
        """Something comes after this block that needs its outputs."""
        self._replay = replay
        self._share = share

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

    def make(
        self, targets: Sequence[Target], quantize: Callable[[Target], tuple[Form, float | None]]
    ) -> None:
        """Give ``targets`` their forms: ``quantize(target)`` gives a form and its loss. Several
        processes share the targets: ``quantize`` is called for this one's only."""
        processes = self._share.processes
        if processes.size == 1:
            for target in targets:
                self.put(target, *quantize(target))
            return
        owners = self._owners(targets)
        mine = {
            target.name: quantize(target)
            for target, owner in zip(targets, owners, strict=True)
            if owner == processes.rank
        }
        for target, owner in zip(targets, owners, strict=True):
            sent = None
            if target.name in mine:
                form, loss = mine[target.name]
                sent = (self._share.pack(target, form), loss)
            tensors, loss = processes.exchange(sent, owner, self.weight(target).device)
            self.put(target, self._share.unpack(target, tensors), loss)

    def _owners(self, targets: Sequence[Target]) -> list[int]:
        """The process that quantizes each target: the largest go first to who has least."""
        loads = [0] * self._share.processes.size
        owners = [0] * len(targets)
        sizes = [target.out_features * target.in_features**2 for target in targets]
        for number in sorted(range(len(targets)), key=lambda n: (-sizes[n], n)):
            owners[number] = loads.index(min(loads))
            loads[owners[number]] += sizes[number]
        return owners

    def agree(self, make: Callable[[], Any]) -> Any:
        """JSON-able data that the first process makes, for all of them. What depends on the
        inputs at hand and decides what happens must come from here."""
        return self._share.processes.agree(make)

    def spread(self, count: int, make: Callable[[int], Tensor | None]) -> list[Tensor | None]:
        """``[make(0), ..., make(count - 1)]``, each made by one of the processes."""
        processes = self._share.processes
        device = self._device
        found: list[Tensor | None] = []
        made = [make(n) if n % processes.size == processes.rank else None for n in range(count)]
        for number in range(count):
            owner = number % processes.size
            value = made[number]
            sent = None
            if owner == processes.rank:
                sent = ({} if value is None else {"value": value}, None)
            tensors, _ = processes.exchange(sent, owner, device)
            found.append(tensors.get("value"))
        return found

    @property
    def _device(self) -> torch.device:
        return self.weight(self.targets[0]).device

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
        number = 0

        def hook(target: str, observer: Observer) -> Any:
            def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
                observer(args[0].detach().reshape(-1, args[0].shape[-1]), number)
                waiting.discard(target)
                if not waiting:
                    raise _Enough

            return seen

        with ExitStack() as stack:
            for name, observer in observers.items():
                module = self.model.get_submodule(name)
                handle = module.register_forward_pre_hook(hook(name, observer))
                stack.callback(handle.remove)
            calls = zip(self._replay.numbers, self.inputs(), strict=True)
            for number, (args, kwargs) in calls:  # noqa: B007 the hooks read it
                # An expert that no token of a batch reaches is never called: the batch just ends.
                waiting.update(observers)
                try:
                    with torch.no_grad():
                        self.module(*args, **kwargs)
                except _Enough:
                    continue

    def pass_on(self, observers: Mapping[str, Observer]) -> None:
        """Run all batches through the block once; what they give are the next block's inputs.

        Inputs of targets (by name) go to observers on their way.
        """
        number = 0

        def hook(observer: Observer) -> Any:
            def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
                observer(args[0].detach().reshape(-1, args[0].shape[-1]), number)

            return seen

        outputs = []
        with ExitStack() as stack:
            for name, observer in observers.items():
                handle = self.model.get_submodule(name).register_forward_pre_hook(hook(observer))
                stack.callback(handle.remove)
            calls = zip(self._replay.numbers, self.inputs(), strict=True)
            for number, (args, kwargs) in calls:  # noqa: B007 the hooks read it
                with torch.no_grad():
                    outputs.append(self.module(*args, **kwargs))
        self._replay.take(self.index, outputs)
        self.finished = True

    def moments(
        self, groups: Sequence[Sequence[Target]], magnitudes: bool = False
    ) -> list[Moments]:
        """Moments of the inputs of each of ``groups``, whose members share one, in one pass.

        Raises:
            QuantmillError: an input is not finite; the first such target is named.
        """
        made = [self._moments(group, magnitudes) for group in groups]
        self.observe({group[0].name: item.add for group, item in zip(groups, made, strict=True)})
        for group, item in zip(groups, made, strict=True):
            self._join(group, item)
        return made

    def in_order(
        self,
        groups: Sequence[Sequence[Target]],
        after: Callable[[int, Moments], None],
    ) -> None:
        """For each of ``groups``, in the order in which they run, gather the moments of the input
        that the ones before it leave, and call ``after(number, moments)``.

        One pass over the block when the batches' intermediate results fit into
        ``STAGED_BYTES``, and one pass per group otherwise.

        Raises:
            QuantmillError: an input is not finite; its target is named.
        """
        made = [self._moments(group, False) for group in groups]

        def reached(number: int) -> None:
            self._join(groups[number], made[number])
            if made[number].square.nbytes >= LARGE:
                # Factoring takes several of that size, beside what the batches freed.
                give_back()
            after(number, made[number])
            made[number].free()

        hidden = self._replay.hidden or self._replay.first_inputs()
        kept = staged_bytes(sum(tensor.numel() * tensor.element_size() for tensor in hidden))
        if kept > STAGED_BYTES or self.module is self.model:
            for number, group in enumerate(groups):
                self.observe({group[0].name: made[number].add})
                reached(number)
            return

        def call(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Callable[[], Any]:
            args, kwargs = arguments
            return lambda: self.module(*args, **kwargs)

        stops = [
            (self.model.get_submodule(group[0].name), item.add)
            for group, item in zip(groups, made, strict=True)
        ]
        calls = [call(item) for item in self.inputs()]
        outputs = run_staged(calls, self._replay.numbers, stops, reached, self.wanted)
        if self.wanted:
            self._replay.take(self.index, outputs)
        self.finished = True

    def _moments(self, group: Sequence[Target], magnitudes: bool) -> Moments:
        exact = [self.exact.pop(target.name, None) for target in group]
        return Moments(
            group[0].in_features,
            self._device,
            lanes_of(self._replay.total),
            self._share.processes,
            self._share.kernels,
            magnitudes,
            next((inputs for inputs in exact if inputs is not None), None),
        )

    def run_exact(self, targets: Collection[str]) -> None:
        """Keep what ``targets`` (names) would get in the float model. Experts get none: there,
        other tokens would be routed to them."""
        groups = {
            group[0].name: [target.name for target in group if target.name in targets]
            for group in self.call_order()
            if "weight" not in group[0].module.parts
        }
        linears = {
            name: self.model.get_submodule(name) for name, members in groups.items() if members
        }
        found = self._replay.run_exact(self.index, self.module, linears)
        self.exact = {name: inputs for first, inputs in found.items() for name in groups[first]}

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
        """Targets in the order in which they run, those that share one input together.

        Experts run in the order of their numbers, whichever of them the first batch reaches.
        """
        prefix = f"{self.name}." if self.name else ""
        by_name = {target.name.removeprefix(prefix): target for target in self.targets}
        parts = tuple((name, type(part)) for name, part in self.module.named_modules())
        orders, structure = self._share.orders, (parts, tuple(by_name))
        if structure not in orders:
            # Blocks of the same modules run these in the same order.
            orders[structure] = self.agree(
                lambda: order_of_calls(self.model, by_name, self.run_first)
            )
        groups = [[by_name[name] for name in group] for group in orders[structure]]
        return in_order_of_experts(groups, self.targets)

    def _join(self, group: Sequence[Target], moments: Moments) -> None:
        """Bring the processes' sums together; refuse NaN and infinity."""
        moments.join()
        if moments.tokens and not moments.finite:
            raise QuantmillError(
                NAN_ACTIVATION(
                    group[0].name,
                    "its input is NaN or infinite, or too large to be squared",
                    "use a dtype of wider range (--dtype float32) or other data, or mend the layer"
                    " before it",
                )
            )
        if group[0].module.parts:
            self.tokens.update(dict.fromkeys((item.name for item in group), moments.tokens))
            moments.square = shrunk(moments.square, moments.tokens)


class _Enough(Exception):
    """Every observed target of a batch has been seen."""
