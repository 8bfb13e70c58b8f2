"""Carrying out a route: one engine and one sink, with forms of the source where they fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.architecture import open_architecture
from quantmill.calibration.carry_out import carry_out, needs_calibration, resume_folder
from quantmill.checkpoint.containers import container_for
from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.checkpoint.reader import TensorReader
from quantmill.conversion.beside import files_beside
from quantmill.conversion.goal import Goal
from quantmill.conversion.measure import Distance, between, paired_rows
from quantmill.conversion.route import Route, Step
from quantmill.conversion.view import ROWS, Stored, float_view, stored_targets
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Form, float_rows
from quantmill.job import Job, Options, Selection
from quantmill.stages.configure import configure
from quantmill.stages.quantize import Sink, codec_of, decode_stored, open_reader, run, run_modules
from quantmill.stages.select import add_selection, make_selection
from quantmill.stages.target import decisions_for, make_plan
from quantmill.stages.validate import validate
from quantmill.stages.write import WriteReport, write_checkpoint
from quantmill.targeting.types import Decision, ModuleInfo, ParameterInfo, Target

__all__ = ["ConversionReport", "carry", "target_job"]

DIFFERENT = declare("QM-CONVERT-003", "A converted weight does not decode to the source's values")


@dataclass(slots=True)
class ConversionReport:
    """A conversion: its route and, unless it was a dry run, what was written."""

    route: Route
    written: WriteReport | None = None
    errors: dict[str, Distance] = field(default_factory=dict)
    """By module: the distance from the source's values, for steps that change them."""
    rescaled: bool = False
    """Calibration moved scales between weights: errors of single weights mean nothing."""
    losses: dict[str, float] = field(default_factory=dict)
    """By module: relative squared error of outputs, where calibration measured it."""
    proved: int | None = None
    """Modules whose written weights were decoded again and found equal; None without proof."""

    @property
    def total(self) -> Distance:
        """All errors together; a source without changed values has none."""
        found = Distance()
        for item in self.errors.values():
            found.join(item)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        written = self.written
        return {
            "route": self.route.to_dict(),
            "folder": None if written is None else str(written.folder),
            "files": {} if written is None else written.files,
            "bytes": None if written is None else written.bytes,
            "seconds": None if written is None else written.seconds,
            "proved": self.proved,
            "rescaled": self.rescaled,
            "error": self.total.to_dict() if self.errors else None,
            "errors": {name: item.to_dict() for name, item in self.errors.items()},
            "losses": self.losses,
        }


def target_job(job: Job, goal: Goal, route: Route, output: Path, options: Options) -> Job:
    """The job that writes: over the float view of the source, with the route's decisions.

    Raises:
        QuantmillError: the goal's config is invalid, or two plugins claim it.
    """
    assert job.plan is not None
    floats = {step.weight: getattr(torch, step.dtype) for step in route.steps if step.dtype}
    view_dtype = getattr(torch, goal.dtype or job.plan.dtype)
    headers: CheckpointHeaders = job.headers
    beside = files_beside(job)
    if job.prequantized or beside:
        headers = float_view(job, view_dtype, floats, beside)
    made = Job(
        host=job.host,
        headers=headers,
        request=replace(job.request, raw=goal.raw, text=goal.text),
        device=job.device,
        dtype=goal.dtype or job.dtype,
        options=replace(options, output=str(output)),
        progress=job.progress,
        findings=job.findings,
        container=container_for(output, job.host),
    )
    made.architecture = open_architecture(made.host, made.headers, made.dtype)
    labels = _select(made, goal, route)
    kinds = goal.method.capabilities.target_kinds if goal.method is not None else ()
    peers = {entry.name for entry in job.plan.modules if entry.kind in kinds}
    anew = [step.name for step in route.steps if step.kind in ("requantize", "quantize")]
    decisions = _rules(made, set(anew))
    for step in route.steps:
        if step.name in decisions:
            continue
        if step.name in labels:
            made_by = f"converted: {step.kind}"
            decisions[step.name] = Decision(step.name, "quantize", labels[step.name], made_by, "")
        else:
            why = "the source holds it as float" if step.kind == "copy" else step.kind
            # A peer must be told to keep it float, like all that a user keeps.
            origin = "default" if step.name in peers else "method"
            decisions[step.name] = Decision(step.name, "keep", None, why, origin)
    make_plan(made, decisions)
    _exact_bytes(made, route)
    validate(made)
    return made


def _rules(made: Job, anew: set[str]) -> dict[str, Decision]:
    """What the goal's targeting says of modules that are made anew: some methods choose by it."""
    if not anew:
        return {}
    assert made.architecture is not None
    found = decisions_for(made, list(made.architecture.modules))
    return {
        item.module: item for item in found if item.module in anew and item.action == "quantize"
    }


def _select(made: Job, goal: Goal, route: Route) -> dict[str, str]:
    """Fill the job's selections; the label of each step that ends quantized."""
    labels: dict[str, str] = {}
    if goal.method is None:
        return labels
    exact = [step.options for step in route.steps if step.kind == "exact"]
    # What is made anew follows the options that most exact steps have.
    common = max(exact, key=exact.count) if exact else {}
    for step in route.steps:
        if step.kind not in ("exact", "requantize", "quantize"):
            continue
        options = step.options if step.kind == "exact" else common
        raw = {**goal.raw, **options}
        _, config = configure(made, raw, "user", method=goal.method.name)
        selection = make_selection(made, goal.method.name, config, goal.text)
        labels[step.name] = add_selection(made, selection)
    return labels


def _exact_bytes(made: Job, route: Route) -> None:
    """Correct the plan's entries of exact steps: the form is the source's, not a quantizer's."""
    assert made.plan is not None
    steps = {step.name: step for step in route.steps if step.kind == "exact"}
    for index, entry in enumerate(made.plan.modules):
        step = steps.get(entry.name)
        if step is None or entry.target is None:
            continue
        rest = sum(
            made.headers.tensors[source].nbytes
            for local, parameter in entry.target.module.parameters.items()
            if local != entry.target.parameter
            for source in parameter.sources
        )
        made.plan.modules[index] = replace(
            entry,
            form=step.result,
            bytes_before=step.bytes_before + rest,
            bytes_after=step.bytes_after + rest,
        )


def carry(job: Job, route: Route, made: Job, max_shard_bytes: int | None) -> ConversionReport:
    """Write what ``made`` plans.

    Raises:
        QuantmillError: a weight can't be read, quantized or written; nothing is left behind.
    """
    report = ConversionReport(route)
    output = Path(str(made.options.output))
    assert made.plan is not None
    made.plan.raise_errors()
    anew = any(step.kind in ("requantize", "quantize") for step in route.steps)

    def engine(inner: Job, sink: Sink) -> None:
        measuring = _Measuring(job, route, sink, report)
        if anew and needs_calibration(inner):
            carry_out(inner, measuring, resume_folder(output))
            for losses in inner.state.get("losses", {}).values():
                report.losses.update(losses)
            return
        with _Forms(job, route, inner) as forms:
            _stream(inner, measuring, forms)

    report.written = write_checkpoint(made, output, max_shard_bytes, engine)
    if report.rescaled:
        report.errors.clear()
    return report


def _stream(made: Job, sink: Sink, forms: Mapping[str, Form | None]) -> None:
    """As :func:`quantmill.stages.quantize.run`, with forms of the source."""
    assert made.architecture is not None
    if not len(forms):
        run(made, sink)
        return
    modules = made.architecture.modules
    with made.stage("quantize"), open_reader(made.headers) as reader:
        for done, module in enumerate(run_modules(made, sink, modules, reader, forms), 1):
            made.advance(done, len(modules), module.name)


class _Forms(Mapping[str, "Form | None"]):
    """The source's forms in the goal's layout by name of the target, made when asked for."""

    def __init__(self, job: Job, route: Route, made: Job) -> None:
        self._job, self._made = job, made
        exact = {step.name for step in route.steps if step.kind == "exact"}
        self._stored = {
            item.target.name: item
            for item in stored_targets(job).values()
            if item.target.name in exact
        }
        assert made.plan is not None
        self._labels = {entry.name: entry.method for entry in made.plan.modules}

    def __enter__(self) -> _Forms:
        self._reader = open_reader(self._job.headers)
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Form:
        item = self._stored[name]
        form = decode_stored(self._job, self._reader, item.target, item.selection).regular()
        selection = self._made.selections[self._labels[name] or ""]
        config = selection.config
        wanted = {
            key: getattr(config, key) for key in type(config).model_fields if key != "unknown"
        }
        codec = type(codec_of(self._made, selection))
        return codec.fit(form, item.target, type(config).normalise(wanted)).form


class _Measuring:
    """A sink that takes the distance of what passes from the source's values."""

    def __init__(self, job: Job, route: Route, sink: Sink, report: ConversionReport) -> None:
        self._job, self._sink, self._report = job, sink, report
        self._steps = {step.name: step for step in route.steps}
        self._stored = {item.target.name: item for item in stored_targets(job).values()}

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        step = self._steps[target.name]
        if step.kind != "exact":
            with open_reader(self._job.headers) as reader:
                pairs = self._pairs(target, form, reader)
                self._report.errors[target.name] = between(pairs)
        self._sink.put_form(selection, target, form, bias)

    def _pairs(
        self, target: Target, form: Form, reader: TensorReader
    ) -> Iterator[tuple[Tensor, Tensor]]:
        item = self._stored.get(target.name)
        if item is not None:
            yield from paired_rows(_decoded(self._job, reader, item), form)
            return
        assert self._job.architecture is not None
        parameter = target.module.parameters[target.parameter]
        weight = self._job.architecture.assemble(parameter, reader)
        if target.transposed:
            weight = weight.transpose(-1, -2)
        count = max(1, ROWS // max(1, form.shape[-1]))
        for start, rows in float_rows(form, count):
            yield weight[start : start + rows.shape[0]].to(torch.float32), rows

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        changed = getattr(reader, "changed", {})
        if any(source in changed for source in parameter.sources):
            self._report.rescaled = True
        step = self._steps.get(module.name)
        if step is not None and step.kind == "dequantize":
            self._rounding(step, parameter, reader)
        self._sink.put_tensor(module, parameter, reader)

    def _rounding(self, step: Step, parameter: ParameterInfo, reader: TensorReader) -> None:
        """What casting a weight costs."""
        item = self._stored.get(step.name)
        goal = getattr(torch, step.result)
        found = self._report.errors.setdefault(step.name, Distance())
        if item is None:
            whole = reader.tensor(parameter.sources[0]).to(torch.float32)
            found.add(whole, whole.to(goal).to(torch.float32))
        elif parameter.sources[:1] == (item.weight,):
            with open_reader(self._job.headers) as inner:
                form = _decoded(self._job, inner, item)
                for _, rows in float_rows(form, max(1, ROWS // max(1, form.shape[-1]))):
                    found.add(rows, rows.to(goal).to(torch.float32))


def _decoded(job: Job, reader: TensorReader, item: Stored) -> Form:
    return decode_stored(job, reader, item.target, item.selection)


def prove(job: Job, route: Route, again: Job, report: ConversionReport) -> None:
    """Decode what was written and compare it with the source, weight by weight; sets
    ``report.proved``. ``again`` is the written checkpoint's job, prepared.

    Raises:
        QuantmillError: a weight differs. What was written is removed then.
    """
    assert report.written is not None
    try:
        report.proved = _prove(job, route, again, report)
    except QuantmillError:
        if report.written.folder.is_dir():
            shutil.rmtree(report.written.folder)
        else:
            for name in report.written.files:
                report.written.folder.with_name(name).unlink(missing_ok=True)
        raise


def _prove(job: Job, route: Route, again: Job, report: ConversionReport) -> int:
    steps = [step for step in route.steps if step.kind != "copy"]
    sources = {item.target.name: item for item in stored_targets(job).values()}
    results = {item.target.name: item for item in stored_targets(again).values()}
    proved = 0
    with open_reader(job.headers) as old, open_reader(again.headers) as new:
        for done, step in enumerate(steps, 1):
            job.advance(done, len(steps), f"proving {step.name}")
            source = sources.get(step.name)
            if source is None:
                continue
            form = _decoded(job, old, source)
            if step.name in results:
                # Exact steps have no error; others the one that was measured while writing.
                wanted = report.errors.get(step.name, Distance())
                found = between(paired_rows(form, _decoded(again, new, results[step.name])))
                if step.kind != "exact" and report.rescaled:
                    continue
                same = found.equal == wanted.equal and found.noise == wanted.noise
            else:
                same = _same_floats(form, new, source)
            if not same:
                raise QuantmillError(
                    DIFFERENT(step.name, "its decoded weights are not equal", "report this")
                )
            proved += 1
    return proved


def _same_floats(form: Form, reader: TensorReader, source: Stored) -> bool:
    written = reader.tensor(source.weight)
    target = source.target
    if target.transposed and tuple(form.shape) == (target.out_features, target.in_features):
        written = written.transpose(-1, -2)
    count = max(1, ROWS // max(1, form.shape[-1]))
    return all(
        torch.equal(written[start : start + rows.shape[0]], rows.to(written.dtype))
        for start, rows in float_rows(form, count)
    )
