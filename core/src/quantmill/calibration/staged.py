"""One pass through a block with stops: all batches pause where a linear gets its input.

Quantizing a block in the order in which its linears run needs, for each linear, the inputs that
the quantized ones before it give. Running the block anew for each costs several passes; here each
batch runs in a greenlet that pauses at every stop until all batches have reached it and the linear
there has been quantized. The price is memory: what a batch computed so far is kept.

Greenlets share one thread, and so one team of OpenMP workers: with a thread for each batch there
would be a team for each, and libgomp lets the workers of so many fall asleep after each operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

__all__ = ["run_staged"]

Observer = Callable[[Tensor, int], None]

_DEVICES = ("cpu", "cuda")


def _modes() -> tuple[bool, ...]:
    """What torch keeps per thread and a model's context managers change."""
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in _DEVICES))


def _set_modes(modes: tuple[bool, ...]) -> None:
    torch.set_grad_enabled(modes[0])
    for device, autocast in zip(_DEVICES, modes[1:], strict=True):
        torch.set_autocast_enabled(device, autocast)


class _Run:
    """One batch; ``at`` is the stop it waits at, ``None`` when it has ended."""

    def __init__(self, call: Callable[[], Any], number: int) -> None:
        self.number = number
        self.at: int | None = -1
        self.output: Any = None
        self._call = call
        self.greenlet = greenlet(self._run)

    def _run(self) -> None:
        with torch.no_grad():
            self.output = self._call()
        self.at = None

    def pause(self, stop: int) -> None:
        """Called within the batch."""
        self.at = stop
        modes = _modes()
        assert self.greenlet.parent is not None
        self.greenlet.parent.switch()
        _set_modes(modes)

    def resume(self) -> None:
        """Let it run to its next stop, or its end; raise what it raised."""
        self._enter(self.greenlet.switch)

    def abandon(self) -> None:
        """End it, wherever it is."""
        if self.greenlet:
            self._enter(lambda: self.greenlet.throw(GreenletExit))

    def _enter(self, switch: Callable[[], Any]) -> None:
        modes = _modes()
        self.greenlet.parent = getcurrent()
        try:
            switch()
        finally:
            _set_modes(modes)


def run_staged(
    calls: Sequence[Callable[[], Any]],
    numbers: Sequence[int],
    stops: Sequence[tuple[nn.Module, Observer]],
    after: Callable[[int], None],
    to_the_end: bool = True,
) -> list[Any]:
    """Run every call once; outputs in order, or nothing if calls end at the last stop.

    Args:
        calls: one per batch.
        numbers: of the batches, for the observers.
        stops: modules in the order in which they run, each with what sees its input
            ``[tokens, in]`` in every batch before it computes.
        after: ``after(i)`` is called when all batches have been seen at stop ``i``, and may
            change weights: the module there then computes with the new ones.
        to_the_end: go on after the last stop.
    """
    runs = [_Run(call, number) for call, number in zip(calls, numbers, strict=True)]
    of_greenlet = {run.greenlet: run for run in runs}
    reached = -1

    def hook(stop: int, observer: Observer) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            run = of_greenlet.get(getcurrent())
            # A module that is called again, or before its turn comes, is quantized already.
            if run is None or stop <= reached:
                return
            observer(args[0].detach().reshape(-1, args[0].shape[-1]), run.number)
            run.pause(stop)

        return seen

    with ExitStack() as stack:
        for number, (module, observer) in enumerate(stops):
            handle = module.register_forward_pre_hook(hook(number, observer))
            stack.callback(handle.remove)
        for run in runs:
            stack.callback(run.abandon)
        for stop in range(len(stops)):
            for run in runs:
                # A batch may pass a stop by (an expert that none of its tokens is routed to).
                while run.at is not None and run.at < stop:
                    run.resume()
            after(stop)
            reached = stop
        if not to_the_end:
            return []
        for run in runs:
            while run.at is not None:
                run.resume()
    return [run.output for run in runs]
