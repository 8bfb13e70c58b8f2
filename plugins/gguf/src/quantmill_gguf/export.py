"""A model into a GGUF file: the sink of the engine.

The header comes first and says where everything will be; then each tensor is written to its place
when the engine brings it, experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor

from quantmill.backend import ContainerWriter
from quantmill.findings import Finding, QuantmillError
from quantmill.stages.quantize import planned_form
from quantmill_gguf import codes
from quantmill_gguf.codec import type_of
from quantmill_gguf.layout import Layout, Planned, layout_of, nbytes
from quantmill_gguf.metadata import metadata_of, metadata_problems
from quantmill_gguf.split import SplitWriter
from quantmill_gguf.types import TYPES
from quantmill_gguf.types.sizes import BY_NAME, PLAIN
from quantmill_gguf.writer import TensorSpec

if TYPE_CHECKING:
    from quantmill.checkpoint.reader import TensorReader
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target

__all__ = ["GgufExport", "types_of"]

_WIDE: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def types_of(job: Job, layout: Layout) -> dict[str, str]:
    """The type of every tensor, as ``job.plan`` decided.

    Raises:
        QuantmillError: parts of one tensor would have different types.
    """
    assert job.plan is not None
    found = {name: planned.kept for name, planned in layout.tensors.items()}
    given: dict[str, str] = {}
    parts: dict[str, int] = {}
    for entry in job.plan.modules:
        if entry.action != "quantize" or entry.target is None or entry.method is None:
            continue
        planned = layout.tensor_of(entry.target.weight_name)
        if planned is None:
            continue
        selection = job.selections[entry.method]
        dtype = getattr(torch, job.plan.dtype)
        form = planned_form(job, selection, entry.target, dtype)
        assert form is not None
        made = type_of(form)
        move = layout.entries[entry.target.weight_name].move
        if not move.keeps(BY_NAME[made].block):
            cause = f"its columns lie in another order in a file, which cuts blocks of {made}"
            fix = "take a type of smaller blocks for it (Q8_0), or keep it float"
            raise QuantmillError(codes.NO_BLOCKS(entry.target.name, cause, fix))
        parts[planned.name] = parts.get(planned.name, 0) + 1
        if given.setdefault(planned.name, made) != made:
            raise _uneven(planned.name, f"some of it would be {made}, some {given[planned.name]}")
        found[planned.name] = made
    for name, count in parts.items():
        whole = len(layout.tensors[name].parameters)
        if count != whole:
            raise _uneven(name, f"{count} of its {whole} parts are quantized")
    return found


def _uneven(name: str, cause: str) -> QuantmillError:
    fix = "give all experts of a block one type, or keep them all"
    return QuantmillError(codes.UNEVEN(name, f"a tensor has one type, and {cause}", fix))


class GgufExport(ContainerWriter):
    """Writes one file, or a split."""

    def __init__(self, job: Job, path: Path, max_file_bytes: int | None = None) -> None:
        super().__init__(job, path, max_file_bytes)
        self.layout = layout_of(job)
        self.types = types_of(job, self.layout)
        metadata, kinds = metadata_of(job, self.layout, self.types)
        specs = [
            TensorSpec(item.name, self.types[item.name], item.shape)
            for item in self.layout.tensors.values()
        ]
        specs += [
            TensorSpec(name, "F32", (len(values),)) for name, values in self.layout.tables.items()
        ]
        self._writer = SplitWriter(path, metadata, specs, kinds, max_file_bytes)

    @classmethod
    def check(cls, job: Job) -> Iterable[Finding]:
        layout = layout_of(job)
        fix = "keep it in a folder, or take a model that llama.cpp computes"
        for problem in layout.problems:
            yield codes.CANT_EXPORT(str(job.options.output), problem, fix)
        if layout.family is None:
            return
        try:
            types_of(job, layout)
        except QuantmillError as error:
            yield from error.findings
        yield from metadata_problems(job, layout)

    @classmethod
    def kept(cls, job: Job, module: ModuleInfo, parameter: ParameterInfo) -> tuple[str, int] | None:
        planned = layout_of(job).tensor_of(parameter.name)
        if planned is None:
            return None
        # Of stacked experts each module counts its own part.
        return planned.kept, nbytes(tuple(parameter.shape), planned.kept)

    @classmethod
    def shared(cls, job: Job, target: Target) -> str | None:
        # Experts are stacked in a file.
        planned = layout_of(job).tensor_of(target.weight_name)
        return None if planned is None or len(planned.parameters) < 2 else planned.name

    def __enter__(self) -> Self:
        self._writer.__enter__()
        try:
            for name, values in self.layout.tables.items():
                self._writer.put(name, torch.tensor(values).view(torch.uint8))
        except BaseException:
            self._writer.__exit__(Exception, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.__exit__(*exc)

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        name = target.weight_name
        entry, planned = self._place(name)
        kind = TYPES[self.types[planned.name]]
        raw = kind.raw(form).to("cpu")
        self._put(planned, name, entry.move.write_rows(raw) if not entry.move.plain else raw)
        info = target.module.parameters.get("bias")
        if bias is not None and info is not None:
            self._put_float(info.name, bias)

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        assert self.job.architecture is not None
        if self.types[self._place(parameter.name)[1].name] not in PLAIN:
            # A type stands in the header before the weight is read.
            cause = "it was planned quantized, and holds NaN or infinity"
            fix = f"repair the checkpoint, or keep it float: --skip {module.name}"
            raise QuantmillError(codes.NOT_QUANTIZED(parameter.name, cause, fix))
        self._put_float(parameter.name, self.job.architecture.assemble(parameter, reader))

    def commit(self) -> list[Path]:
        return self._writer.commit()

    def _place(self, parameter: str) -> tuple[Any, Planned]:
        planned = self.layout.tensor_of(parameter)
        assert planned is not None, f"{parameter} is not in the layout"
        return self.layout.entries[parameter], planned

    def _put_float(self, parameter: str, tensor: Tensor) -> None:
        entry, planned = self._place(parameter)
        values = tensor.detach().to("cpu")
        if not entry.move.packed:
            values = values.to(torch.float32)
        moved = entry.move.write(values) if not entry.move.plain else values
        raw = moved.to(_WIDE[self.types[planned.name]]).contiguous().reshape(-1)
        self._put(planned, parameter, raw.view(torch.uint8))

    def _put(self, planned: Planned, parameter: str, raw: Tensor) -> None:
        part = self.layout.entries[parameter].part
        self._writer.put(planned.name, raw, 0 if part is None else part * raw.numel())
