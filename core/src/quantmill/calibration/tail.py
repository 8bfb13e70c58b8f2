"""What lies outside a model's blocks, as one more block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantmill.calibration.block import Block, Observer

if TYPE_CHECKING:
    from torch import nn

    from quantmill.targeting.types import Target

__all__ = ["Tail"]


class Tail(Block):
    """The model around its blocks: calls give the output through the stored hidden states."""

    def pass_on(self, observers: Mapping[str, Observer]) -> None:
        self.observe(observers)

    def inputs(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """One call of the whole model per batch, made by :meth:`Replay.finish`."""
        for _ in self._replay.finish():
            yield (), {}

    def observe(self, observers: Mapping[str, Observer]) -> None:
        handles = []
        number = 0
        for name, observer in observers.items():
            module = self._replay.model.get_submodule(name)

            def seen(_: nn.Module, args: tuple[Any, ...], observer: Observer = observer) -> None:
                observer(args[0].detach().reshape(-1, args[0].shape[-1]), number)

            handles.append(module.register_forward_pre_hook(seen))
        outputs = self._replay.finish()
        try:
            for number in self._replay.numbers:  # noqa: B007 the hooks read it
                next(outputs)
        finally:
            outputs.close()
            for handle in handles:
                handle.remove()

    def run_first(self) -> Any:
        return next(self._replay.finish())

    def call_order(self) -> list[list[Target]]:
        return [[target] for target in self.targets]
