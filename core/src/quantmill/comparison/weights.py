"""Weights of two checkpoints, block by block: distances, histograms, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.architecture import Architecture, open_architecture
from quantmill.conversion.measure import Distance
from quantmill.conversion.view import Stored, float_view, stored_targets
from quantmill.findings import Findings, QuantmillError, declare
from quantmill.forms import Affine, Codebook, Form, ScaledFloat
from quantmill.job import Job
from quantmill.planning import ModulePlan
from quantmill.stages.quantize import decode_stored, open_reader
from quantmill.targeting.types import ModuleInfo, ParameterInfo

__all__ = ["BINS", "Aligned", "ModuleComparison", "Side", "compare_weights"]

DIFFERENT_MODELS = declare("QM-COMPARE-001", "The two checkpoints are not of one model")
BINS: Final = 61
"""Of a histogram of values, over :data:`SPAN` standard deviations to each side."""
SPAN: Final = 5.0
_BLOCK: Final = 1 << 21
_SHOWN: Final = 5


@dataclass(slots=True)
class Aligned:
    """The distance that is left when every input column may be scaled: what calibration that
    moves scales between weights (AWQ) can't be blamed for."""

    product: Tensor | None = None
    square: Tensor | None = None
    total: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take float32 blocks ``[rows, columns]``."""
        product = (a.double() * b.double()).sum(0)
        square = (a.double() ** 2).sum(0)
        self.product = product if self.product is None else self.product + product
        self.square = square if self.square is None else self.square + square
        self.total += float((b.double() ** 2).sum())

    @property
    def relative(self) -> float:
        """Norm of what no scaling of columns explains, over the norm of ``b``."""
        if self.product is None or self.square is None or self.total <= 0:
            return 0.0
        explained = torch.where(self.square > 0, self.product**2 / self.square, 0.0).sum()
        return math.sqrt(max(0.0, self.total - float(explained)) / self.total)


@dataclass(slots=True)
class ModuleComparison:
    """One weight in both checkpoints."""

    name: str
    """Of the module."""
    role: str | None
    layer: int | None
    projection: str
    """The last part of its name: ``q_proj``."""
    shape: tuple[int, ...]
    forms: tuple[str, str]
    bytes: tuple[int, int]
    distance: Distance = field(default_factory=Distance)
    aligned: Aligned = field(default_factory=Aligned)
    values: tuple[list[int], list[int]] = ([], [])
    """Histograms over :data:`BINS` even bins of ``SPAN`` standard deviations of the first."""
    deviation: float = 0.0
    codes: tuple[list[int] | None, list[int] | None] = (None, None)
    """How often each code is used; None for what has none, or more than 256."""

    @property
    def is_matrix(self) -> bool:
        """It is a weight that methods quantize, not a norm or a bias."""
        return len(self.shape) > 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "name": self.name,
            "role": self.role,
            "layer": self.layer,
            "projection": self.projection,
            "shape": list(self.shape),
            "forms": list(self.forms),
            "bytes": list(self.bytes),
            **self.distance.to_dict(),
            "relative_error_columns_scaled": self.aligned.relative,
            "code_use": [usage(codes) for codes in self.codes],
        }


def usage(codes: list[int] | None) -> dict[str, Any] | None:
    """Entropy in bits, and the share of codes that occur at all."""
    if not codes:
        return None
    counts = torch.tensor(codes, dtype=torch.float64)
    shares = counts[counts > 0] / counts.sum()
    return {
        "entropy_bits": float(-(shares * shares.log2()).sum()),
        "used": int((counts > 0).sum()),
        "of": len(codes),
    }


class Side:
    """One of the two checkpoints: its float view, and its forms."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.view = float_view(job, torch.float32) if job.prequantized else job.headers
        self.architecture: Architecture = (
            open_architecture(job.host, self.view) if job.prequantized else _architecture(job)
        )
        self.stored: dict[str, Stored] = {
            item.target.name: item for item in stored_targets(job).values()
        }
        assert job.plan is not None
        self.plan: dict[str, ModulePlan] = {entry.name: entry for entry in job.plan.modules}
        self.modules: dict[str, ModuleInfo] = {
            item.name: item for item in self.architecture.modules
        }

    def __enter__(self) -> Side:
        self.reader = open_reader(self.view)
        self.inner = open_reader(self.job.headers)
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()
        self.inner.close()

    def rows(self, parameter: ParameterInfo, count: int) -> Iterator[Tensor]:
        """float32 blocks of a parameter, of ``count`` rows."""
        direct = not self.architecture.converted(parameter) and len(parameter.shape) > 0
        if direct:
            for _, block in self.reader.row_blocks(parameter.sources[0], count):
                yield block.to(torch.float32).reshape(block.shape[0], -1)
            return
        whole = self.architecture.assemble(parameter, self.reader)
        flat = whole.to(torch.float32).reshape(max(1, whole.shape[0] if whole.dim() else 1), -1)
        for start in range(0, flat.shape[0], count):
            yield flat[start : start + count]

    def form(self, name: str) -> Form | None:
        """The stored form of a module, or None for a float one."""
        item = self.stored.get(name)
        if item is None:
            return None
        return decode_stored(self.job, self.inner, item.target, item.selection).regular()

    def words(self, module: str, parameter: ParameterInfo) -> str:
        """The form, for tables."""
        entry = self.plan.get(module)
        quantized = entry is not None and entry.action == "quantize"
        return entry.form if quantized and entry is not None else parameter.dtype

    def nbytes(self, module: str) -> int:
        """Bytes of a module on disk."""
        entry = self.plan.get(module)
        return 0 if entry is None else entry.bytes_before


def _architecture(job: Job) -> Architecture:
    assert job.architecture is not None
    return job.architecture


def compare_weights(a: Side, b: Side, findings: Findings) -> Iterator[ModuleComparison]:
    """Every parameter of two checkpoints of one model, with a histogram for matrices.

    Raises:
        QuantmillError: they are not of one model.
    """
    _same_model(a, b)
    total = len(a.modules)
    for done, (name, module) in enumerate(a.modules.items(), 1):
        other = b.modules[name]
        a.job.advance(done, total, f"comparing {name}")
        main = _main(module)
        for local, parameter in module.parameters.items():
            twin = other.parameters[local]
            if not parameter.sources or not twin.sources:
                continue
            if parameter.dtype not in _FLOATS or twin.dtype not in _FLOATS:
                continue
            if parameter.name in a.architecture.tied:
                continue
            yield _one(a, b, module, local, (parameter, twin), local == main)


_FLOATS: Final = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def _main(module: ModuleInfo) -> str:
    return "weight" if "weight" in module.parameters else next(iter(module.parameters), "")


def _one(
    a: Side,
    b: Side,
    module: ModuleInfo,
    local: str,
    pair: tuple[ParameterInfo, ParameterInfo],
    main: bool,
) -> ModuleComparison:
    parameter, twin = pair
    shape = tuple(parameter.shape)
    whole = module.name if main else f"{module.name}.{local}"
    found = ModuleComparison(
        name=whole,
        role=module.role,
        layer=module.layer,
        projection=module.name.rpartition(".")[2],
        shape=shape,
        forms=(a.words(module.name, parameter), b.words(module.name, twin)),
        bytes=(a.nbytes(module.name), b.nbytes(module.name)) if main else (0, 0),
    )
    width = 1
    for extent in shape[1:]:
        width *= extent
    count = max(1, _BLOCK // width)
    bins = [torch.zeros(BINS, dtype=torch.float64) for _ in range(2)]
    for x, y in zip(a.rows(parameter, count), b.rows(twin, count), strict=True):
        found.distance.add(x, y)
        if not found.is_matrix:
            continue
        found.aligned.add(x, y)
        if found.deviation == 0.0:
            found.deviation = float(x.std()) or 1.0
        edge = SPAN * found.deviation
        for store, values in zip(bins, (x, y), strict=True):
            store += torch.histc(values.clamp(-edge, edge), BINS, -edge, edge).double()
    if found.is_matrix:
        found.values = ([int(n) for n in bins[0]], [int(n) for n in bins[1]])
        found.codes = (
            (_codes(a.form(module.name)), _codes(b.form(module.name)))
            if main
            else (
                None,
                None,
            )
        )
    return found


def _codes(form: Form | None) -> list[int] | None:
    """How often each code occurs: signed ones from the lowest, floats by their bits."""
    if isinstance(form, ScaledFloat):
        if form.values.element_size() != 1:
            return None
        flat = form.values.view(torch.uint8).reshape(-1)
        return torch.bincount(flat, minlength=256).tolist()
    if not isinstance(form, Affine | Codebook) or form.codes.bits > 8:
        return None
    codes = form.codes.unpack().reshape(-1)
    if codes.dtype == torch.int8:
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    return torch.bincount(codes, minlength=2**form.codes.bits).tolist()


def _same_model(a: Side, b: Side) -> None:
    """Raise unless both have the same parameters in the same shapes."""

    def shapes(side: Side) -> Mapping[str, tuple[int, ...]]:
        return {
            parameter.name: tuple(parameter.shape)
            for module in side.modules.values()
            for parameter in module.parameters.values()
        }

    first, second = shapes(a), shapes(b)
    causes = []
    types = [side.job.headers.config.get("model_type") for side in (a, b)]
    if types[0] != types[1]:
        causes.append(f"one is a {types[0]}, the other a {types[1]}")
    for name in first.keys() & second.keys():
        if first[name] != second[name]:
            causes.append(f"{name} is {list(first[name])} and {list(second[name])}")
    for names, which in (
        (first.keys() - second.keys(), "first"),
        (second.keys() - first.keys(), "second"),
    ):
        if names:
            causes.append(f"only the {which} has {min(names)} and {len(names) - 1} more")
    if causes:
        more = f"; and {len(causes) - _SHOWN} more differences" if len(causes) > _SHOWN else ""
        raise QuantmillError(
            DIFFERENT_MODELS(
                f"{a.job.headers.source.describe()} and {b.job.headers.source.describe()}",
                "; ".join(sorted(causes)[:_SHOWN]) + more,
                "give two checkpoints of one model",
            )
        )
