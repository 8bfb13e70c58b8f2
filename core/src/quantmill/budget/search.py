"""The search: every method alone, the sensitivity of every target, the allocation, the result.

Every method first quantizes the whole model by itself, into a folder beside the output: calibrated
methods meet there the inputs that they would meet in the end, and the codes of each target are at
hand for the estimate. The chosen mixture is then quantized anew, in one go, and more thoroughly.
What makes up for the errors of other targets (GPTAQ) would only blur what each costs by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor

from quantmill.api import make_job, prepare, quantize
from quantmill.budget.choices import Budget, Choices, joined_method
from quantmill.budget.lanes import Lane
from quantmill.budget.report import BudgetReport
from quantmill.budget.sensitivity import Pair, Sensitivity, correlation
from quantmill.calibration.carry_out import calibration_data
from quantmill.checkpoint.containers import container_for
from quantmill.checkpoint.writer import check_new
from quantmill.findings import Finding, FindingsError
from quantmill.host import Host, default_host
from quantmill.job import Job, Progress, named_progress
from quantmill.registrations import resolve
from quantmill.stages.quantize import decode_stored, open_reader
from quantmill.stages.select import select
from quantmill.targeting.types import Target

if TYPE_CHECKING:
    from quantmill.checkpoint.reader import TensorReader
    from quantmill.config import MethodConfig

__all__ = ["BudgetReport", "BudgetSearch", "quantize_to_budget"]

WINDOWS: Final = 8
"""Batches of the search on which mixtures are measured."""


def quantize_to_budget(
    source: str | Path,
    output: str | Path,
    budget: Budget | float | str,
    methods: Sequence[str],
    *,
    calibration: Any,
    measure: int = 24,
    search_samples: int = 32,
    progress: Progress | None = None,
    host: Host | None = None,
    max_shard_bytes: int | None = None,
    **options: Any,
) -> BudgetReport:
    """Quantize a checkpoint with several methods, each where it costs least, within a budget.

    Args:
        source: a float model.
        output: the new folder or file.
        budget: bits per weight of the targets, scales and all: ``4.25`` or ``"4.25bpw"``.
        methods: METHODs to choose from for each target, as short names with options.
        calibration: text for the search, and for calibrated methods.
        measure: pairs of target and method whose KL divergence is measured, to judge the estimate.
        search_samples: windows of the calibration text that the search runs on. Where there are
            twice as many, the methods are not calibrated on these until the mixture is made.
        progress: told about blocks and bytes.
        host: of plugins.
        max_shard_bytes: as for :func:`quantmill.quantize`.
        options: further ones of :func:`quantmill.quantize`.

    Raises:
        QuantmillError: the budget is less than the least possible, or what ``quantize`` raises.
    """
    wanted = Budget.of(budget)
    search = BudgetSearch(
        source,
        Path(output),
        methods,
        calibration,
        search_samples=search_samples,
        host=host,
        progress=progress,
        **options,
    )
    search.choices.bytes_within(wanted)
    with search:
        search.run(measure)
        return search.write(wanted, Path(output), max_shard_bytes)


class BudgetSearch:
    """One search, for as many budgets as are asked for; a context manager."""

    def __init__(
        self,
        source: str | Path,
        output: Path,
        methods: Sequence[str],
        calibration: Any,
        *,
        search_samples: int = 32,
        host: Host | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Plans each method alone, as it would be written to ``output``: only headers are read.

        Raises:
            FindingsError: what stands in the way of any of them, or of the output.
        """
        self.host, self.progress = host or default_host(), progress
        self.output, self.calibration, self.options = output, calibration, options
        self.work = output.absolute().parent / f".{output.name}.quantmill-budget"
        self.seconds: dict[str, float] = {}
        self.found: Sensitivity | None = None
        self.stack = ExitStack()
        if container_for(output, self.host) is None:
            check_new(output)
            self.suffix = ""
        else:
            self.suffix = output.suffix
        # Read once: a Hub is asked over the network.
        self.headers = make_job(source, host=self.host, planning=True).headers
        self.methods = self._agreed(list(dict.fromkeys(methods)))
        self.jobs = [self._job(label) for label in self.methods]
        plans = {}
        problems: list[Finding] = []
        for label, job in zip(self.methods, self.jobs, strict=True):
            plans[label] = prepare(job)
            problems += [item for item in job.findings.errors if item not in problems]
        if problems:
            raise FindingsError(problems)
        self.finals = [
            _with(label, next(iter(job.selections.values())).config.thorough())
            for label, job in zip(self.methods, self.jobs, strict=True)
        ]
        """Methods as the mixture takes them."""
        self.choices = Choices.of(plans, self._shared)
        self.data = calibration_data(self.jobs[0])
        self.windows, self.learned = _split(self.data.tokens, search_samples)

    def _job(self, label: str) -> Job:
        options = {**self.options, "calibration": self.calibration, "output": str(self.output)}
        return make_job(self.headers, label, host=self.host, **options)

    def _shared(self, target: Target) -> str | None:
        """What a container has one tensor for."""
        job = self.jobs[0]
        if job.container is None or job.container.write is None:
            return None
        found: str | None = resolve(job.container.write).shared(job, target)
        return found

    def _agreed(self, methods: list[str]) -> list[str]:
        """Methods of one plugin with the options that one checkpoint has for all its modules."""
        if not methods:
            return methods
        jobs = [self._job(label) for label in methods]
        configs: dict[str, list[MethodConfig]] = {}
        for job in jobs:
            selection = next(iter(select(job).values()))
            configs.setdefault(selection.method.name, []).append(selection.config)
        agreed = []
        for label, job in zip(methods, jobs, strict=True):
            selection = next(iter(job.selections.values()))
            wanted = selection.config.shared(configs[selection.method.name])
            agreed.append(_with(label, wanted))
        return list(dict.fromkeys(agreed))

    def __enter__(self) -> Self:
        """The folder for what is made on the way; what an interrupted search left is used again."""
        about = {
            "source": self.headers.source.identity(),
            "methods": self.methods,
            "calibration": self.data.digest,
            "windows": self.windows.shape[0],
            "options": {name: str(value) for name, value in sorted(self.options.items())},
        }
        note = self.work / "about.json"
        text = json.dumps(about)
        if self.work.exists() and not (note.is_file() and note.read_text("utf-8") == text):
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        note.write_text(text, encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.stack.close()
        # An interrupt is worth going on from; anything else fails again.
        if kind is None or issubclass(kind, Exception):
            shutil.rmtree(self.work, ignore_errors=True)

    def run(self, measure: int = 24) -> None:
        """Every method alone, then estimates for all pairs and measurements of some."""
        self._quantize_each()
        self.found = self._sensitivity(measure)

    def _quantize_each(self) -> None:
        samples, length = self.learned.shape
        options = {**self.options, "samples": samples, "length": length}
        for number, label in enumerate(self.methods):
            start = perf_counter()
            folder = self._made(number)
            if not folder.exists():
                quantize(
                    self.headers,
                    folder,
                    label,
                    calibration=self.learned,
                    progress=named_progress(self.progress, label),
                    host=self.host,
                    **options,
                )
            self.seconds[f"quantize {label}"] = perf_counter() - start

    def _made(self, number: int) -> Path:
        return self.work / f"method-{number}{self.suffix}"

    def _sensitivity(self, measure: int) -> Sensitivity:
        start = perf_counter()
        device = self.options.get("device", "cpu")
        # Gradients of likelihoods are small numbers: float32 where that costs no speed.
        job = make_job(
            self.headers,
            self.methods[0],
            device=device,
            dtype="float32" if device == "cpu" else None,
            host=self.host,
            planning=True,
            **{
                k: v for k, v in self.options.items() if k in ("skip", "include", "allow_unmatched")
            },
        )
        prepare(job)
        stored = {
            label: _Stored(self.stack, self._made(number), self.host, device)
            for number, label in enumerate(self.methods)
        }

        def weight(target: Target, label: str) -> Tensor:
            return stored[label].weight(target)

        found = Sensitivity(
            job,
            [self.windows[n : n + 1] for n in range(self.windows.shape[0])],
            self.choices.targets,
            self.methods,
            weight,
            self.work,
            seed=int(self.options.get("seed", 0)),
            tell=named_progress(self.progress, "sensitivity"),
        )
        found.run(self._pairs(measure), WINDOWS)
        self.seconds["sensitivity"] = perf_counter() - start
        return found

    def _pairs(self, count: int) -> list[Pair]:
        """Pairs to measure: spread over the targets, the methods in turn."""
        targets, labels = self.choices.targets, self.methods
        count = min(count, len(targets) * len(labels))
        if count < 1:
            return []
        every = [
            (
                targets[int(number * len(targets) / count) % len(targets)].name,
                labels[number % len(labels)],
            )
            for number in range(count)
        ]
        return list(dict.fromkeys(every))

    def write(
        self,
        budget: Budget,
        output: Path,
        max_shard_bytes: int | None = None,
    ) -> BudgetReport:
        """Allocate within a budget, and write the mixture.

        Raises:
            QuantmillError: the budget is less than the least possible, or what ``quantize`` raises.
        """
        start, choices, found = perf_counter(), self.choices, self.found
        assert found is not None
        scale = found.scales()
        costs = [
            [found.estimated[target.name, label] * scale[label] for label in choices.labels]
            for target in choices.targets
        ]
        chosen = choices.allocate(costs, choices.bytes_within(budget))
        labels = {
            target.name: choices.labels[index]
            for target, index in zip(choices.targets, chosen, strict=True)
        }
        mixture = Lane(labels)
        found.measure([mixture], WINDOWS)
        seconds = {**self.seconds, "allocation": perf_counter() - start}
        size = sum(row[index] for row, index in zip(choices.sizes, chosen, strict=True))
        pairs = [
            (name, label, found.estimated[name, label], value)
            for (name, label), value in found.measured.items()
        ]
        report = BudgetReport(
            budget=budget.bits,
            bits=choices.bits(size),
            bytes=size,
            chosen=labels,
            estimated=mixture.divergence,
            uniform={
                label: (choices.bits(choices.uniform(label)), sum(row[index] for row in costs))
                for index, label in enumerate(choices.labels)
            },
            sensitivity={
                target.name: dict(zip(choices.labels, row, strict=True))
                for target, row in zip(choices.targets, costs, strict=True)
            },
            measured=pairs,
            correlation=correlation([item[2] for item in pairs], [item[3] for item in pairs]),
            seconds=seconds,
            method=joined_method(choices, chosen, self.finals),
        )
        start = perf_counter()
        report.written = quantize(
            self.headers,
            output,
            report.method,
            calibration=self.calibration,
            progress=named_progress(self.progress, "the mixture"),
            host=self.host,
            max_shard_bytes=max_shard_bytes,
            **self.options,
        )
        seconds["the mixture"] = perf_counter() - start
        report.findings = list(report.written.plan.findings)
        return report


def _with(label: str, options: Mapping[str, Any]) -> str:
    """METHOD with further options."""
    words = ",".join(f"{key}={json.dumps(value)}" for key, value in options.items())
    return label + (("," if ":" in label else ":") + words if words else "")


def _split(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Windows to search on and windows to calibrate on: apart, unless they are too few.

    A calibrated method errs less on what it was calibrated on, not everywhere by the same share.
    """
    picked = torch.linspace(0, rows.shape[0] - 1, min(count, rows.shape[0])).round().long()
    left = torch.ones(rows.shape[0], dtype=torch.bool)
    left[picked] = False
    apart = int(left.sum()) >= picked.numel()
    return rows[picked], rows[left] if apart else rows


class _Stored:
    """Weights of a checkpoint that was made on the way."""

    def __init__(self, stack: ExitStack, path: Path, host: Host, device: str) -> None:
        self.job = make_job(path, None, device=device, host=host, planning=True)
        plan = prepare(self.job)
        self.entries = {
            entry.target.name: entry
            for entry in plan.modules
            if entry.action == "quantize" and entry.target is not None
        }
        self.reader: TensorReader = stack.enter_context(open_reader(self.job.headers, device))

    def weight(self, target: Target) -> Tensor:
        """Float32 ``[out, in]``."""
        entry = self.entries[target.name]
        assert entry.target is not None
        selection = self.job.selections[entry.method or next(iter(self.job.selections))]
        form = decode_stored(self.job, self.reader, entry.target, selection)
        return form.dequantize(torch.float32)
