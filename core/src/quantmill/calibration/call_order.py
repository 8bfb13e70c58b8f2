"""The order in which a block's linears run, seen by running it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantmill.targeting.types import Target

__all__ = ["order_of_calls"]


def order_of_calls(
    model: nn.Module, targets: Mapping[str, Target], run: Callable[[], Any]
) -> list[list[str]]:
    """Names of ``targets`` in the order in which ``run`` calls them, those that get the same input
    together; those that it doesn't reach, each alone, at the end."""
    order: list[tuple[int, list[str]]] = []

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            key = id(args[0]) if args[0]._base is None else id(args[0]._base)
            alive.append(args[0])
            for other, members in order:
                if other == key:
                    members.append(name)
                    return
            order.append((key, [name]))

        return seen

    alive: list[Tensor] = []  # an id is only good while its object lives
    with ExitStack() as stack:
        for name, target in targets.items():
            module = model.get_submodule(target.name)
            handle = module.register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
            if not target.module.parts:
                stack.enter_context(_idle(module, target.out_features))
        run()
    found = [list(dict.fromkeys(members)) for _, members in order]
    reached = {name for members in found for name in members}
    return found + [[name] for name in targets if name not in reached]


@contextmanager
def _idle(linear: nn.Module, out_features: int) -> Iterator[None]:
    """Let a linear give zeros for a while: who calls it, and when, doesn't depend on what it
    gives."""
    before = vars(linear).get("forward")
    linear.forward = lambda x, *_, **__: x.new_zeros(*x.shape[:-1], out_features)
    try:
        yield
    finally:
        del linear.forward
        if before is not None:
            linear.forward = before
