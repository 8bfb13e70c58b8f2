"""Importance matrices in a job: measured ones to files, and those of files to quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.findings import Finding, QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.config import GgufConfig
from quantmill_gguf.imatrix import Entry, Imatrix
from quantmill_gguf.layout import layout_of
from quantmill_gguf.mixes import NEEDY
from quantmill_gguf.types import TYPES

if TYPE_CHECKING:
    from quantmill.backend import WeightSource
    from quantmill.calibration.importance import Measured
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.targeting.types import Target

__all__ = ["findings", "matrix_of", "quantize", "write"]

_UNMEASURED = ("token_embd.weight", "output.weight")
"""Tensors that importance matrices usually leave out."""


def matrix_of(job: Job) -> tuple[Path, Imatrix] | None:
    """The importance matrix that the job's method names, read once, and its path.

    Raises:
        QuantmillError: it can't be read.
    """
    paths = [
        item.config.imatrix
        for item in job.selections.values()
        if isinstance(item.config, GgufConfig) and item.config.imatrix is not None
    ]
    if not paths:
        return None
    state = job.state.setdefault("gguf", {})
    if "imatrix" not in state:
        state["imatrix"] = Path(paths[0]), Imatrix.read(Path(paths[0]))
    found: tuple[Path, Imatrix] = state["imatrix"]
    return found


def quantize(job: Job, selection: Selection, target: Target, weight: WeightSource) -> Form | None:
    """The form of a weight whose importance is known; None for others."""
    from quantmill.stages.quantize import quantizer_of
    from quantmill_gguf.quantizer import GgufQuantizer

    found = matrix_of(job)
    if found is None:
        return None
    importance = _importance(job, found[1], target)
    quantizer = quantizer_of(job, selection)
    if importance is None or not isinstance(quantizer, GgufQuantizer):
        return None
    return quantizer.quantize(target, weight, importance)


def _importance(job: Job, matrix: Imatrix, target: Target) -> Tensor | None:
    """float32 ``[columns]`` of a target, or None where the matrix does not have it.

    Raises:
        QuantmillError: it does not fit.
    """
    layout = layout_of(job)
    entry = layout.entries.get(target.weight_name)
    if entry is None or entry.tensor not in matrix.entries:
        return None
    mean = matrix.entries[entry.tensor].mean()
    shape = layout.tensors[entry.tensor].shape
    parts = shape[0] if len(shape) > 2 else 1
    if mean.numel() != parts * shape[-1]:
        of = f"{parts} x {shape[-1]}" if parts > 1 else str(shape[-1])
        cause = f"its importance has {mean.numel()} values, the weight {of} columns"
        fix = "compute the importance matrix again, from this model"
        raise QuantmillError(codes.IMPORTANCE(target.weight_name, cause, fix))
    return mean.reshape(parts, shape[-1])[entry.part or 0]


def findings(job: Job) -> Iterator[Finding]:
    """Whether a job's importance matrix can be read and belongs to its model."""
    if job.prequantized or job.architecture is None or job.plan is None:
        return
    try:
        found = matrix_of(job)
    except QuantmillError as error:
        yield from error.findings
        return
    if found is None:
        yield from _missing(job)
        return
    path, matrix = found
    if layout_of(job).family is None:
        cause = "it goes by llama.cpp's names of tensors, and the model's architecture has none"
        yield codes.IMPORTANCE(str(path), cause, "leave it out")
        return
    used, lacking = 0, []
    for entry in job.plan.modules:
        if entry.action != "quantize" or entry.target is None or entry.method is None:
            continue
        config = job.selections[entry.method].config
        if not isinstance(config, GgufConfig):
            continue
        if not TYPES[config.type_for(entry.target.in_features)].weighs:
            continue
        try:
            there = _importance(job, matrix, entry.target) is not None
        except QuantmillError as error:
            yield from error.findings
            return
        planned = layout_of(job).tensor_of(entry.target.weight_name)
        used += there
        if not there and planned is not None and planned.name not in _UNMEASURED:
            lacking.append(planned.name)
    if lacking and not used:
        cause = f"none of its {len(matrix.entries)} entries is of this model: it lacks {lacking[0]}"
        yield codes.IMPORTANCE(str(path), cause, "compute the importance matrix from this model")
    elif lacking:
        cause = f"it lacks {len(lacking)} of the model's tensors, {lacking[0]} for one"
        fix = "nothing to do: they are quantized as without an importance matrix"
        yield codes.NOT_MEASURED(str(path), cause, fix)


def _missing(job: Job) -> Iterator[Finding]:
    """A mix that llama-quantize makes with an importance matrix only."""
    for item in job.selections.values():
        config = item.config
        if isinstance(config, GgufConfig) and config.mix in NEEDY and config.type is None:
            cause = "llama-quantize refuses this mix without an importance matrix: errors are large"
            fix = "measure one with quantmill imatrix, and give it: --imatrix FILE"
            yield codes.NO_IMPORTANCE(f"gguf-{config.mix.lower()}", cause, fix)
            return


def write(job: Job, measured: Measured, path: Path) -> None:
    """Write what was measured as a file of llama.cpp's.

    Raises:
        QuantmillError: the architecture is none of llama.cpp's, or the file can't be written.
    """
    layout = layout_of(job)
    if layout.family is None or layout.problems:
        cause = layout.problems[0]
        raise QuantmillError(codes.CANT_EXPORT(str(path), cause, "take a model of llama.cpp's"))
    parts: dict[str, dict[int, tuple[Tensor, int]]] = {}
    for name, item in measured.squares.items():
        entry = layout.entries.get(f"{name}.weight")
        if entry is not None:
            of = parts.setdefault(entry.tensor, {})
            of[entry.part or 0] = item.total.to(torch.float32), item.tokens
    entries = {}
    for tensor, found in parts.items():
        shape = layout.tensors[tensor].shape
        count = shape[0] if len(shape) > 2 else 1
        # A part that was left out is like one that no token reached.
        empty = torch.zeros(shape[-1]), 0
        rows = [found.get(index, empty) for index in range(count)]
        counts = torch.tensor([float(tokens) for _, tokens in rows])
        entries[tensor] = Entry(torch.stack([sums for sums, _ in rows]), counts)
    Imatrix(entries, measured.windows, measured.length, [measured.text]).write(path)
