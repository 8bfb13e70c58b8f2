"""The calibrating engine: block by block, from the checkpoint to the same sinks as all others.

Memory holds the modules outside the blocks, one block, and the hidden states between two blocks.
A block's weights are read, its linears meet their real inputs (those that the quantized blocks
before it give), its calibrator turns them into forms, the sink takes them, and it is dropped.

Several processes share the batches and the targets of each block; all of them hold the block and
get every form, so that each goes on as if it were alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.backend import BlockCalibrator, NonFiniteWeight
from quantmill.calibration.attention import KernelAttention
from quantmill.calibration.block import Block, Share
from quantmill.calibration.data import CalibrationData, Calls
from quantmill.calibration.mixture import few_tokens
from quantmill.calibration.moments import lane_owner, lanes_of
from quantmill.calibration.overlay import OverlayReader
from quantmill.calibration.replay import Replay, find_blocks
from quantmill.calibration.resume import Progress
from quantmill.calibration.tail import Tail
from quantmill.checkpoint.reader import TensorReader
from quantmill.findings import QuantmillError, Severity, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Form
from quantmill.heap import give_back, one_heap
from quantmill.job import Job, Selection
from quantmill.stages.calibrating import calibrator_of
from quantmill.stages.quantize import Sink, codec_of, keep_non_finite, open_reader, run_modules
from quantmill.targeting.types import ModuleInfo, Target

__all__ = ["Run", "calibrate"]

NOT_REACHED = declare(
    "QM-CALIB-040",
    "Modules got no form from calibration",
    Severity.ERROR,
)
_FEW_BYTES = 256 << 20
"""Free bytes that stay in the heap from one block to the next: paging them in anew takes an eighth
of a small model's time."""
_FEW_BLOCKS = 8
"""After so many they go back all the same, for what lies between them splits them up."""
_PASSING = ("QM-CKPT", "QM-PROCESS")
_Calibrators = Sequence[tuple[BlockCalibrator[Any], set[str]]]


def calibrate(
    job: Job, sink: Sink | None, data: CalibrationData | Calls, keep: Path | None
) -> None:
    """Carry out ``job.plan`` with calibration; ``keep`` is a folder for resuming, or None.
    Without a sink this process only helps the others.

    Raises:
        QuantmillError: the model can't be replayed, a weight or an activation is not finite, or
            ``keep`` holds another job.
    """
    with open_reader(job.headers) as reader, one_heap():
        run = Run(job, sink, data, keep, reader)
        try:
            run.run()
        except QuantmillError as error:
            # Bad weights or data stay bad: a full disk or a lost process is worth another try.
            if not any(item.code.startswith(_PASSING) for item in error.findings):
                run.progress.abandon()
            raise


class Run:
    """One job: its state between two blocks. :func:`calibrate` is what to call."""

    def __init__(
        self,
        job: Job,
        sink: Sink | None,
        data: CalibrationData | Calls,
        keep: Path | None,
        reader: TensorReader,
    ) -> None:
        assert job.plan is not None and job.architecture is not None
        self.job, self.sink, self.data, self.reader = job, sink, data, reader
        self.plan, self.architecture = job.plan, job.architecture
        self.dtype: torch.dtype = getattr(torch, job.plan.dtype)
        self.targets: dict[str, tuple[Target, Selection]] = {}
        for entry in job.plan.modules:
            if entry.action == "quantize" and entry.target is not None:
                label = entry.method or next(iter(job.selections))
                self.targets[entry.target.name] = (entry.target, job.selections[label])
        self.calibrated = {
            name: pair for name, pair in self.targets.items() if pair[1].method.calibrator
        }
        self.modules = {module.name: module for module in self.architecture.modules}
        self.changed: dict[str, Tensor] = {}
        """Float tensors that calibration changed, by checkpoint name."""
        self.processes = job.processes
        self.share = Share(self.processes, job.kernels, self._pack, self._unpack)
        self.progress = Progress(keep, self._about(), self.processes)

    def _about(self) -> dict[str, Any]:
        import quantmill

        return {
            "source": self.job.headers.source.identity(),
            "methods": {
                # All fields: what no checkpoint records changes the bytes, too.
                label: item.config.model_dump(mode="json")
                for label, item in self.job.selections.items()
            },
            "targets": {name: pair[1].label for name, pair in sorted(self.targets.items())},
            "tokens": self.data.digest,
            "dtype": self.plan.dtype,
            "device": self.job.device.partition(":")[0],
            "seed": self.job.options.seed,
            "version": quantmill.__version__,
            "torch": torch.__version__,
        }

    def _calibrators(self) -> list[tuple[BlockCalibrator[Any], set[str]]]:
        """One per method that calibrates, with the names of its targets."""
        found: dict[str, tuple[BlockCalibrator[Any], set[str]]] = {}
        for name, (_, selection) in self.calibrated.items():
            reference = selection.method.calibrator
            assert reference is not None
            if reference not in found:
                found[reference] = (calibrator_of(self.job, selection), set())
            found[reference][1].add(name)
        return list(found.values())

    def run(self) -> None:
        """All blocks, then what lies outside them, then everything to the sink."""
        job = self.job
        calibrators = self._calibrators()
        with job.stage("calibrate"), KernelAttention(job.kernels):
            model = self.architecture.build()
            blocks, count = find_blocks(model, list(self.calibrated))
            inner = f"{blocks}." if blocks else ""
            outside = [m for m in self.modules.values() if not m.name.startswith(inner)]
            self._load(model, outside)
            self._finish(model, inner)
            model.eval()
            replay = Replay(model, blocks, *self._batches())
            names = list(replay.blocks._modules)
            total = count + 1
            for index in range(count):
                name = f"{inner}{names[index]}"
                inside = [
                    m
                    for m in self.modules.values()
                    if m.name == name or m.name.startswith(f"{name}.")
                ]
                if index < self.progress.finished:
                    forms = self._restore(index, name)
                    last = index + 1 == self.progress.finished
                    if last and (index + 1 < count or self._outside(inner)):
                        kept = self.progress.inputs(replay.numbers)
                        replay.hidden = [kept[n].to(job.device) for n in replay.numbers]
                        kept = self.progress.inputs(replay.numbers, exact=True)
                        replay.exact = [kept[n].to(job.device) for n in sorted(kept)]
                else:
                    self._advance(index, total, name)
                    forms = self._block(model, replay, calibrators, name, index, inside, inner)
                self._send(inside, forms)
                give_back(beyond=_FEW_BYTES if (index + 1) % _FEW_BLOCKS else 0)
            self._advance(count, total, "outside the blocks")
            self._send(outside, self._tail(replay, calibrators, inner))
            self._advance(total, total, "done")
        self.progress.remove()

    def _batches(self) -> tuple[dict[int, Any], int]:
        """Batches of this process by number, and how many there are in all."""
        batches = self.data.batches()
        lanes = lanes_of(len(batches))
        count = max(lanes) + 1
        mine = {
            number: _to(batch, self.job.device)
            for number, (batch, lane) in enumerate(zip(batches, lanes, strict=True))
            if lane_owner(lane, count, self.processes.size) == self.processes.rank
        }
        return mine, len(batches)

    def _advance(self, done: int, total: int, what: str) -> None:
        if self.processes.first:
            self.job.advance(done, total, what)

    def _send(self, modules: list[ModuleInfo], forms: Mapping[str, Form | None]) -> None:
        if self.sink is not None:
            overlay: Any = OverlayReader(self.reader, self.changed)
            for _ in run_modules(self.job, self.sink, modules, overlay, forms):
                pass
        self.changed.clear()

    def _finish(self, model: nn.Module, inner: str) -> None:
        """Complete the model around its blocks; these get their weights one by one, later."""
        made = {
            parameter.name
            for module in self.modules.values()
            for parameter in module.parameters.values()
            if not parameter.sources
        }
        later = {
            name
            for name, parameter in model.named_parameters()
            if inner and name.startswith(inner) and parameter.is_meta and name not in made
        }
        before: set[str] = getattr(self.architecture, "elsewhere", set())
        self.architecture.elsewhere = before | later
        try:
            self.architecture.finish(model, self.job.device)
        finally:
            self.architecture.elsewhere = before

    def _load(self, model: nn.Module, modules: list[ModuleInfo]) -> None:
        from quantmill.stages.replace import ModelSink

        sink = ModelSink(self.job, model, self.architecture)
        overlay: Any = OverlayReader(self.reader, self.changed)
        for module in modules:
            for parameter in module.parameters.values():
                if parameter.sources and parameter.name not in self.architecture.tied:
                    sink.put_tensor(module, parameter, overlay)

    def _block(
        self,
        model: nn.Module,
        replay: Replay,
        calibrators: _Calibrators,
        name: str,
        index: int,
        inside: list[ModuleInfo],
        inner: str,
    ) -> dict[str, Form | None]:
        self._load(model, inside)
        module = model.get_submodule(name)
        targets = [self.calibrated[m.name] for m in inside if m.name in self.calibrated]
        configs = {target.name: selection.config for target, selection in targets}
        members = [target for target, _ in targets]
        block = Block(index, name, module, members, configs, replay, self.share)
        block.wanted = index + 1 < len(replay.blocks) or bool(self._outside(inner))
        self._finite(block)
        wanting = {
            target
            for calibrator, names in calibrators
            for target in names
            if calibrator.exact_inputs(self.calibrated[target][1].config)
        }
        if wanting:
            block.run_exact(wanting)
        if block.targets:
            _calibrate(block, replay, calibrators)
            self._complete(block)
        self._take_changes(block)
        if block.wanted and not block.finished:
            replay.advance(index, module)
        self._keep(block, replay)
        _drop(module)
        return block.forms

    def _finite(self, block: Block) -> None:
        """NaN or infinity in a weight ends the job, or by its policy keeps the module float."""
        for target in list(block.targets):
            weight = block.weight(target)
            try:
                with FiniteCheck(target.weight_name) as check:
                    check.look(weight)
                continue
            except NonFiniteWeight as found:
                keep_non_finite(self.job, found, tuple(weight.shape))
            block.targets.remove(target)
            block.forms[target.name] = None

    def _complete(self, block: Block) -> None:
        lost = [target.name for target in block.targets if target.name not in block.forms]
        if lost:
            raise QuantmillError(
                NOT_REACHED(
                    lost[0], f"{len(lost)} targets of {block.name} got no form", "report this"
                )
            )
        few = few_tokens(block.name, block.targets, block.tokens)
        if few is not None:
            self.job.findings.add(few)
        losses = sorted(block.losses.values())
        if losses:
            self.job.state.setdefault("losses", {})[block.name] = dict(block.losses)
            words = f"{block.name} loss {sum(losses) / len(losses):.2e}"
            self._advance(block.index, len(block._replay.blocks) + 1, words)

    def _take_changes(self, block: Block) -> None:
        for target in block.targets:
            # What its form already holds is not written as it is.
            if block.forms.get(target.name) is not None:
                block.changed.pop(f"{target.name}.{target.parameter}", None)
        for name, value in block.changed.items():
            module, _, local = name.rpartition(".")
            sources = self.modules[module].parameters[local].sources
            self.changed[sources[0]] = value.detach().clone()

    def _pack(self, target: Target, form: Form) -> dict[str, Tensor]:
        return codec_of(self.job, self.calibrated[target.name][1]).encode(form)

    def _unpack(self, target: Target, tensors: dict[str, Tensor]) -> Form:
        codec = codec_of(self.job, self.calibrated[target.name][1])
        return codec.decode(tensors, target, self.dtype)

    def _keep(self, block: Block, replay: Replay) -> None:
        if self.progress.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for target in block.targets:
            form = block.forms.get(target.name)
            if form is not None:
                for local, tensor in self._pack(target, form).items():
                    tensors[f"form|{target.name}|{local}"] = tensor
        for name, value in block.changed.items():
            tensors[f"float|{name}"] = value
        about = {
            "losses": block.losses,
            "forms": sorted(name for name, form in block.forms.items() if form is not None),
        }
        about["kept"] = sorted(name for name, form in block.forms.items() if form is None)
        hidden = dict(zip(replay.numbers, replay.hidden, strict=True)) if block.wanted else {}
        exact = {}
        if block.wanted and replay.exact:
            exact = dict(zip(replay.numbers, replay.exact, strict=True))
        self.progress.save(block.index, tensors, about, hidden, exact)

    def _restore(self, index: int, name: str) -> dict[str, Form | None]:
        tensors, about = self.progress.block(index)
        forms: dict[str, Form | None] = dict.fromkeys(about["kept"])
        for module in about["forms"]:
            prefix = f"form|{module}|"
            members = {
                key.removeprefix(prefix): tensor.to(self.job.device)
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
            forms[module] = self._unpack(self.calibrated[module][0], members)
        for key, tensor in tensors.items():
            if key.startswith("float|"):
                owner, _, local = key.removeprefix("float|").rpartition(".")
                sources = self.modules[owner].parameters[local].sources
                self.changed[sources[0]] = tensor
        if about["losses"]:
            self.job.state.setdefault("losses", {})[name] = about["losses"]
        return forms

    def _outside(self, inner: str) -> list[tuple[Target, Selection]]:
        """Calibrated targets outside the blocks."""
        return [pair for name, pair in self.calibrated.items() if not name.startswith(inner)]

    def _tail(
        self, replay: Replay, calibrators: _Calibrators, inner: str
    ) -> dict[str, Form | None]:
        """Targets outside the blocks, such as the output head."""
        outside = self._outside(inner)
        if not outside:
            return {}
        configs = {target.name: selection.config for target, selection in outside}
        members = [target for target, _ in outside]
        block = Tail(len(replay.blocks), "", replay.model, members, configs, replay, self.share)
        self._finite(block)
        _calibrate(block, replay, calibrators)
        self._complete(block)
        return block.forms


def _calibrate(block: Block, replay: Replay, calibrators: _Calibrators) -> None:
    """Each calibrator gives its own targets their forms, with the inputs that those before it
    leave; what the block gives in the end are the next block's inputs."""
    every, hidden = block.targets, replay.hidden
    for calibrator, names in calibrators:
        block.targets = [target for target in every if target.name in names]
        if block.targets:
            # One before it may have passed them on already.
            replay.hidden, block.finished = hidden, False
            calibrator.calibrate(block)
    block.targets = every


def _to(value: Any, device: str) -> Any:
    """Arguments of a call on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value


def _drop(module: nn.Module) -> None:
    """Free the weights of a block."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=False
                )
