"""One pass through a block with stops: all batches pause where a linear gets its input.

Quantizing a block in the order in which its linears run needs, for each linear, the inputs that
the quantized ones before it give. Running the block anew for each costs several passes; here each
batch runs in a thread of its own that waits at every stop until all batches have reached it and
the linear there has been quantized. Exactly one thread runs at any time, in the order of batches,
so results do not depend on scheduling. The price is memory: what a batch computed so far is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["run_staged"]

Observer = Callable[[Tensor, int], None]


class _Run(threading.Thread):
    """One batch; ``at`` is the stop it waits at, ``None`` when it has ended."""

    def __init__(self, call: Callable[[], Any], number: int) -> None:
        super().__init__(daemon=True)
        self.number = number
        self._call = call
        self._mine = threading.Semaphore(0)
        self._theirs = threading.Semaphore(0)
        self.at: int | None = -1
        self.output: Any = None
        self.error: BaseException | None = None
        self.abandoned = False

    def run(self) -> None:
        self._mine.acquire()
        try:
            if not self.abandoned:
                with torch.no_grad():
                    self.output = self._call()
        except BaseException as error:  # noqa: BLE001 raised again where the batch is waited for
            self.error = error
        self.at = None
        self._theirs.release()

    def pause(self, stop: int) -> None:
        """Called in the batch's own thread."""
        self.at = stop
        self._theirs.release()
        self._mine.acquire()
        if self.abandoned:
            raise _Abandoned

    def resume(self) -> None:
        """Let it run to its next stop, or its end; raise what it raised."""
        self._mine.release()
        self._theirs.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """End it, wherever it is."""
        if self.at is not None and self.is_alive():
            self.abandoned = True
            self._mine.release()
            self.join()


class _Abandoned(BaseException):
    pass


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
    of_thread: dict[int, _Run] = {}
    reached = -1

    def hook(stop: int, observer: Observer) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            run = of_thread.get(threading.get_ident())
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
            run.start()
            assert run.ident is not None
            of_thread[run.ident] = run
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
