"""A model that runs without ever being in memory: its blocks' weights come and go.

Memory holds what lies outside the blocks, one block, and the hidden states of all batches between
two blocks. Quantized weights are what they will be in a loaded model: the same modules compute.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantmill.calibration.replay import Replay, find_blocks
from quantmill.stages.quantize import open_reader, run_modules
from quantmill.stages.replace import ModelSink

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantmill.checkpoint.reader import TensorReader
    from quantmill.evaluate import ModelFn
    from quantmill.job import Job
    from quantmill.targeting.types import ModuleInfo

__all__ = ["StreamedModel", "streamed"]


class StreamedModel:
    """The model of a prepared job (stages 1 to 6), block by block over the same batches."""

    def __init__(
        self, job: Job, reader: TensorReader, batches: Sequence[Tensor], *, plain: bool = False
    ) -> None:
        """``batches`` are token ids, int64 ``[n, length]`` each. A ``plain`` model has the float
        weights of the source in the modules that the job would quantize.

        Raises:
            QuantmillError: the model has no list of blocks, or a weight can't be read.
        """
        assert job.plan is not None and job.architecture is not None
        self.job, self.reader, self.plain = job, reader, plain
        self.architecture = job.architecture
        self.model: nn.Module = self.architecture.build()
        modules = list(self.architecture.modules)
        linears = [item.name for item in modules if item.kind != "other"]
        name, self.count = find_blocks(self.model, linears or [item.name for item in modules])
        self.inner = f"{name}." if name else ""
        self.sink = ModelSink(job, self.model, self.architecture)
        self._inside: dict[str, list[ModuleInfo]] = {}
        outside = []
        for item in modules:
            if item.name.startswith(self.inner):
                index = item.name[len(self.inner) :].partition(".")[0]
                self._inside.setdefault(index, []).append(item)
            else:
                outside.append(item)
        self._fill(outside)
        self.sink.tie()
        self.architecture.finish(self.model, job.device)
        self.model.eval()
        there = {number: batch.to(job.device) for number, batch in enumerate(batches)}
        self.replay = Replay(self.model, name, there, len(there))

    def _fill(self, modules: Sequence[ModuleInfo]) -> None:
        if not self.plain:
            for _ in run_modules(self.job, self.sink, modules, self.reader):
                pass
            return
        for module in modules:
            for parameter in module.parameters.values():
                if parameter.sources and parameter.name not in self.architecture.tied:
                    self.sink.put_tensor(module, parameter, self.reader)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights, which are dropped afterwards."""
        module = self.model.get_submodule(f"{self.inner}{index}")
        empty = _state(module)
        try:
            self._fill(self._inside.get(str(index), []))
            module.eval()
            yield module
        finally:
            for part, (modules, parameters, buffers) in empty:
                part._modules, part._parameters, part._buffers = modules, parameters, buffers

    def run(self) -> Iterator[Any]:
        """Every block in turn; then the model's output per batch, in order."""
        total = self.count + 1
        for index in range(self.count):
            self.job.advance(index, total, f"{self.inner}{index}")
            with self.block(index) as module:
                self.replay.advance(index, module)
        self.job.advance(self.count, total, "outside the blocks")
        yield from self.replay.finish()
        self.job.advance(total, total, "done")


def streamed(job: Job, batches: Sequence[Tensor]) -> ModelFn:
    """A prepared job's model as a function of token ids, to be called once with each of
    ``batches``, in their order: what :func:`quantmill.evaluate.evaluate` does with its windows."""
    outputs = _outputs(job, batches)
    waiting = iter(batches)

    def call(ids: Tensor) -> Tensor:
        expected = next(waiting)
        if ids.shape != expected.shape or not bool((ids == expected).all()):
            raise ValueError("a streamed model is called with the batches it was made for")
        output = next(outputs)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    return call


def _outputs(job: Job, batches: Sequence[Tensor]) -> Iterator[Any]:
    with open_reader(job.headers, job.device) as reader:
        model = StreamedModel(job, reader, batches)
        yield from model.run()
    del model
    gc.collect()


def _state(
    module: nn.Module,
) -> list[tuple[nn.Module, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]]:
    """What a block's modules hold before its weights come, to be put back: their memory goes then,
    that of the modules that took the place of others too."""
    return [
        (part, (dict(part._modules), dict(part._parameters), dict(part._buffers)))
        for part in module.modules()
    ]
