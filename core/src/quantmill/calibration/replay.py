"""Replaying a model block by block, through its own forward.

The model's own code makes the arguments of each block (masks, positions, whatever it passes per
layer); only the hidden states are ours. To call block ``i``, the model runs with every earlier
block replaced by one that passes its input on, and the stored hidden states are put in at block
``i``. Hidden states are kept per batch in the model's dtype; nothing else is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.findings import QuantmillError, declare

__all__ = ["Replay", "find_blocks"]

NO_BLOCKS = declare("QM-CALIB-020", "The model has no list of blocks to calibrate one by one")
ODD_BLOCK = declare("QM-CALIB-021", "A block takes or gives no hidden states that can be replayed")


def find_blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, int]:
    """The ``ModuleList`` that holds most of the modules ``names``, and its length.

    Raises:
        QuantmillError: none holds any.
    """
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            prefix = f"{name}." if name else ""
            inside = sum(item.startswith(prefix) for item in names)
            # Of nested lists (experts in blocks) the outer one holds at least as many.
            if inside and inside > max(counts.values(), default=0):
                counts[name] = inside
    if not counts:
        raise QuantmillError(
            NO_BLOCKS(
                type(model).__name__,
                "no ModuleList or Sequential in it holds the modules to quantize",
                "use a method that needs no calibration",
            )
        )
    best = max(counts, key=lambda name: counts[name])
    blocks: Any = model.get_submodule(best)
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for part in block.modules():
            first = owners.setdefault(id(part), index)
            if first != index and any(True for _ in part.parameters()):
                raise QuantmillError(
                    ODD_BLOCK(
                        f"{best}.{index}" if best else str(index),
                        f"it shares a {type(part).__name__} with block {first}, whose weights are"
                        " gone when it is quantized",
                        "give each block modules of its own, or use a method without calibration",
                    )
                )
    return best, len(blocks)


class _Pass(nn.Module):
    """Stands for a block that was run before: gives its input back as that block would."""

    def __init__(self, original: nn.Module, replay: Replay) -> None:
        super().__init__()
        # transformers asks layers for such plain attributes (attention_type, layer_idx).
        for name, value in vars(original).items():
            if not name.startswith("_") and not isinstance(value, nn.Module | Tensor):
                object.__setattr__(self, name, value)
        self._replay = [replay]
        self._original = [original]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # torch.nn.TransformerEncoder looks into its first layer.
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return self._replay[0].like_output(hidden)


class _Caught(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, kwargs)


class Replay:
    """The model, its blocks and the hidden states between two of them."""

    def __init__(
        self, model: nn.Module, blocks: str, batches: Mapping[int, Any], total: int
    ) -> None:
        """Args:
        model: computes with real weights outside its blocks; its blocks may be on meta.
        blocks: name of the list of blocks.
        batches: arguments of the model by the number of the call: token ids ``[n, length]``,
            or what a plain module takes (a tensor, a tuple, or a mapping of keyword arguments).
            Those of this process.
        total: calls of all processes.
        """
        self.model = model
        self.blocks: Any = model.get_submodule(blocks)
        self.blocks_name = blocks
        self.numbers = sorted(batches)
        """Of the batches at hand, among all."""
        self.batches = [batches[number] for number in self.numbers]
        self.total = total
        self.hidden: list[Tensor] = []
        """Input of the block at hand, per batch."""
        self.exact: list[Tensor] = []
        """The same in the float model, where asked for and after the first block."""
        self._rest: tuple[Any, ...] | None = None

    def like_output(self, hidden: Tensor) -> Any:
        """``hidden`` in the shape of a block's output: a tensor, or a tuple that begins with it."""
        return hidden if self._rest is None else (hidden, *self._rest)

    def _call(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self.model(**batch)
        if isinstance(batch, tuple):
            return self.model(*batch)
        if hasattr(self.model, "config"):
            return self.model(input_ids=batch, use_cache=False)
        return self.model(batch)

    @contextmanager
    def _passing(self, index: int) -> Iterator[None]:
        real = list(self.blocks)
        for position in range(index):
            self.blocks[position] = _Pass(real[position], self)
        try:
            yield
        finally:
            for position in range(index):
                self.blocks[position] = real[position]

    def calls(
        self, index: int, hidden: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments with which the model calls block ``index``, per batch; with the hidden states
        at hand, or others."""
        hidden = self.hidden if hidden is None else hidden
        for number, batch in enumerate(self.batches):
            args, kwargs = self._arguments(index, batch)
            if index > 0 or hidden:
                args, kwargs = _with_hidden(args, kwargs, hidden[number])
            yield args, kwargs

    def _arguments(self, index: int, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def caught(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Caught(args, kwargs)

        handle = self.blocks[index].register_forward_pre_hook(
            # First, for observers of a block that is itself a linear are not meant by this call.
            caught,
            prepend=True,
            with_kwargs=True,
        )
        try:
            with torch.no_grad(), self._passing(index):
                self._call(batch)
        except _Caught as found:
            return found.call
        finally:
            handle.remove()
        raise QuantmillError(
            ODD_BLOCK(
                f"{self.blocks_name}.{index}",
                "the model did not call it",
                "use a method that needs no calibration",
            )
        )

    def advance(self, index: int, module: nn.Module) -> None:
        """Run block ``index`` on its inputs; its outputs are the inputs of the next."""
        outputs = []
        for args, kwargs in self.calls(index):
            with torch.no_grad():
                outputs.append(module(*args, **kwargs))
        self.take(index, outputs)

    def first_inputs(self) -> list[Tensor]:
        """Inputs of the first block, which the model makes anew for each call."""
        found = []
        for args, kwargs in self.calls(0):
            found.append(args[0] if args else kwargs["hidden_states"])
        return found

    def take(self, index: int, outputs: Sequence[Any]) -> None:
        """Take what block ``index`` gave as the inputs of the next."""
        self.hidden = self._following(index, outputs)

    def run_exact(
        self, index: int, module: nn.Module, linears: Mapping[str, nn.Module]
    ) -> dict[str, dict[int, Tensor]]:
        """Run the still float block ``index`` on the float model's hidden states.

        Returns:
            Inputs ``[tokens, in]`` of ``linears``, by name and number of the batch.
        """
        found: dict[str, dict[int, Tensor]] = {name: {} for name in linears}
        outputs = []
        with ExitStack() as stack:
            for name, linear in linears.items():

                def seen(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    found[name][number] = args[0].detach().reshape(-1, args[0].shape[-1])

                stack.callback(linear.register_forward_pre_hook(seen).remove)
            calls = zip(self.numbers, self.calls(index, self.exact), strict=True)
            for number, (args, kwargs) in calls:  # noqa: B007 the hooks read it
                with torch.no_grad():
                    outputs.append(module(*args, **kwargs))
        self.exact = self._following(index, outputs)
        return found

    def _following(self, index: int, outputs: Sequence[Any]) -> list[Tensor]:
        following = []
        for output in outputs:
            if isinstance(output, tuple):
                self._rest = tuple(None for _ in output[1:])
                output = output[0]
            if not isinstance(output, Tensor):
                raise QuantmillError(
                    ODD_BLOCK(
                        f"{self.blocks_name}.{index}",
                        f"it gives a {type(output).__name__}",
                        "use a method that needs no calibration",
                    )
                )
            following.append(output)
        return following

    def finish(self) -> Generator[Any]:
        """The model's output per batch, from the hidden states after the last block."""
        for number in range(len(self.batches)):
            with torch.no_grad():
                output = self.output(number, self.hidden[number])
            yield output

    def output(self, number: int, hidden: Tensor) -> Any:
        """The model's output for one batch from its hidden states after the last block; gradients
        flow to them if they are wanted."""
        count = len(self.blocks)

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            return self.like_output(hidden)

        with self._passing(count):
            handle = self.blocks[count - 1].register_forward_hook(put)
            try:
                return self._call(self.batches[number])
            finally:
                handle.remove()


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    raise QuantmillError(
        ODD_BLOCK("block", "its call has no hidden states", "use a method without calibration")
    )
