"""The route of a conversion: for every module, what happens to it and what that costs.

The survey asks the goal's codec which forms fit into its layout. With the tensors at hand the
answer is final; from headers alone it comes with conditions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from quantmill.backend import Codec, Fit
from quantmill.conversion.goal import Goal
from quantmill.conversion.view import Stored, stored_targets
from quantmill.findings import Findings, QuantmillError, declare
from quantmill.forms import Form, float_rows
from quantmill.job import Job, Request
from quantmill.planning import ModulePlan
from quantmill.registrations import resolve
from quantmill.stages.configure import configure
from quantmill.stages.measure import as_float, describe_form, encoded_bytes
from quantmill.stages.quantize import codec_of, decode_stored, member_headers, open_reader
from quantmill.stages.select import make_selection
from quantmill.stages.target import decisions_for
from quantmill.targeting.types import TARGET_KINDS

__all__ = ["EXACT", "Route", "Step", "survey"]

NO_MODEL = declare("QM-CONVERT-005", "The source says nothing of a model")
ADDS_ERROR = declare("QM-CONVERT-002", "The conversion would change values")
_NOT_EXACT: Final = "QM-FORM-001"
EXACT: Final = ("copy", "exact", "float")
"""Kinds of steps that change no value."""


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one module."""

    name: str
    """The module's, in the model."""
    kind: str
    """``copy``: a float tensor as it is; ``exact``: another layout of the same values; ``float``:
    the same values as floats, because the goal has no such modules; ``dequantize``: floats of the
    asked dtype; ``requantize``: quantized again from the dequantized weight; ``quantize``:
    quantized from the source's float weight."""
    source: str
    """The form there, in words."""
    result: str = ""
    """The form here, where it is known."""
    reason: str = ""
    """Why it is not exact."""
    unless: tuple[str, ...] = ()
    """What only the tensors can tell, and would change the kind."""
    notes: tuple[str, ...] = ()
    """What is different although no value is."""
    bytes_before: int = 0
    bytes_after: int = 0
    """Of an exact step; of others the plan knows."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the goal's config that it needs."""
    weight: str = ""
    """Name of the float weight in the checkpoint."""
    dtype: str = ""
    """Of a ``float`` step."""

    @property
    def exact(self) -> bool:
        """No value changes."""
        return self.kind in EXACT

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "weight"}
        return {**data, "unless": list(self.unless), "notes": list(self.notes)}


@dataclass(slots=True)
class Route:
    """Steps for all modules of a checkpoint."""

    source: str
    goal: str
    steps: list[Step]
    settled: bool
    """The tensors were read: no condition is open."""
    findings: Findings = field(default_factory=Findings)

    @property
    def kind(self) -> str:
        """``lossless``, ``dequantize``, ``requantize`` or ``quantize``: its costliest step."""
        kinds = {step.kind for step in self.steps}
        for kind in ("requantize", "quantize", "dequantize"):
            if kind in kinds:
                return kind
        return "lossless"

    @property
    def counts(self) -> dict[str, int]:
        """How many steps are of each kind."""
        return dict(Counter(step.kind for step in self.steps))

    def reasons(self) -> dict[str, list[str]]:
        """Why steps are not exact, each with the modules."""
        found: dict[str, list[str]] = {}
        for step in self.steps:
            if step.kind == "requantize":
                found.setdefault(step.reason, []).append(step.name)
        return found

    def refuse_error(self) -> None:
        """Raise unless no value changes that the user did not ask to change.

        Raises:
            QuantmillError: one finding for each reason.
        """
        problems = [
            ADDS_ERROR(
                names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                reason,
                "choose another format, or accept the error: --allow-requantize",
                modules=names,
            )
            for reason, names in self.reasons().items()
        ]
        if problems:
            raise QuantmillError(*problems)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "source": self.source,
            "goal": self.goal,
            "kind": self.kind,
            "settled": self.settled,
            "counts": self.counts,
            "steps": [step.to_dict() for step in self.steps],
            "findings": self.findings.to_list(),
        }


def survey(job: Job, goal: Goal, *, read: bool) -> Route:
    """A step for every module of a planned job. ``read``: from the tensors, not headers alone.

    Raises:
        QuantmillError: a tensor can't be read or decoded.
    """
    if not any(key != "quantization_config" for key in job.headers.config):
        raise QuantmillError(
            NO_MODEL(
                job.headers.source.describe(),
                "it has no config.json, or names an architecture that nobody here knows, so there"
                " are no names and no shapes that another format could use",
                "convert the model's own folder",
            )
        )
    return _Survey(job, goal, read).route()


class _Survey:
    def __init__(self, job: Job, goal: Goal, read: bool) -> None:
        self.job, self.goal, self.read = job, goal, read
        self.stored = {item.target.name: item for item in stored_targets(job).values()}
        self.codec: type[Codec[Any]] | None = (
            None if goal.method is None else resolve(goal.method.codec)
        )

    def route(self) -> Route:
        job = self.job
        assert job.plan is not None
        entries = job.plan.modules
        total = sum(item.nbytes for item in self.stored.values())
        done = 0
        steps = []
        with open_reader(job.headers) as self.reader:
            for entry in entries:
                item = self.stored.get(entry.name)
                steps.append(self._float(entry) if item is None else self._step(entry, item))
                if item is not None and self.read:
                    done += item.nbytes
                    job.advance(done, total, f"reading {entry.name}")
        steps = _uniform(self._kept(steps), self)
        return Route(job.headers.source.describe(), self.goal.text, steps, self.read, job.findings)

    def _kept(self, steps: list[Step]) -> list[Step]:
        """What the goal keeps float unless it is told otherwise (heads above all) becomes float:
        its peers look for nothing else there. The source's own method knows its modules."""
        method = self.goal.method
        if method is None or not self.stored or method.name in self._methods():
            return steps
        keep = self._defaults(steps)
        with open_reader(self.job.headers) as self.reader:
            for index, step in enumerate(steps):
                if step.name in keep and step.kind in ("exact", "requantize"):
                    item = self.stored[step.name]
                    form = self.form(item).regular()
                    why = f"{method.name} keeps it float: {keep[step.name]}"
                    steps[index] = self._as_float(step, item, form, why)
        return steps

    def _methods(self) -> set[str]:
        return {item.selection.method.name for item in self.stored.values()}

    def _defaults(self, steps: list[Step]) -> dict[str, str]:
        """Modules that the goal's targeting keeps float, with the reason."""
        assert self.goal.method is not None and self.job.architecture is not None
        options = next((step.options for step in steps if step.kind == "exact"), {})
        raw = {**self.goal.raw, **options}
        try:
            _, config = configure(self.job, raw, "user", method=self.goal.method.name)
        except QuantmillError:
            if options:
                raise
            return {}  # Nothing fits; what the goal lacks is said where weights are made anew.
        selection = make_selection(self.job, self.goal.method.name, config, self.goal.text)
        probe = replace(
            self.job,
            request=Request(),
            selections={selection.label: selection},
            checkpoint_config=None,
            stored_targets=None,
            findings=Findings(),
            state={},
        )
        decisions = decisions_for(probe, [as_float(item) for item in self.job.architecture.modules])
        return {item.module: item.reason for item in decisions if item.action != "quantize"}

    def _float(self, entry: ModulePlan) -> Step:
        """A module that the source holds as float."""
        quantize = not self.job.prequantized and self.goal.method is not None
        if quantize and entry.action == "quantize":
            return Step(entry.name, "quantize", entry.form, bytes_before=entry.bytes_before)
        cast = self.goal.dtype is not None and entry.form not in ("", _code(self.goal.dtype))
        return Step(
            entry.name,
            "dequantize" if cast and entry.kind in TARGET_KINDS else "copy",
            entry.form,
            self.goal.dtype or entry.form,
            bytes_before=entry.bytes_before,
            bytes_after=entry.bytes_before,
        )

    def _step(self, entry: ModulePlan, item: Stored) -> Step:
        step = Step(
            *(entry.name, "requantize", entry.form),
            bytes_before=item.nbytes,
            weight=item.weight,
        )
        if self.goal.dtype is not None:
            return replace(step, kind="dequantize", result=self.goal.dtype)
        assert self.goal.method is not None
        form = self.form(item).regular()
        if item.target.kind not in self.goal.method.capabilities.target_kinds:
            why = f"{self.goal.method.name} has no modules of kind {item.target.kind}"
            return self._as_float(step, item, form, why)
        try:
            fit = self.fit(form, item, self.goal.wanted)
        except QuantmillError as error:
            if any(found.code != _NOT_EXACT for found in error.findings):
                raise
            return replace(step, reason=error.findings[0].cause)
        return self.fitted(step, fit)

    def form(self, item: Stored) -> Form:
        """The stored form; on the meta device unless the tensors are read."""
        job = self.job
        if self.read:
            return decode_stored(job, self.reader, item.target, item.selection)
        codec = codec_of(job, item.selection)
        members = member_headers(item.prefix, codec, job.headers)
        assert job.plan is not None
        form = codec.describe(members, item.target, getattr(torch, job.plan.dtype))
        assert form is not None, "the plan has described it"
        return form

    def fit(self, form: Form, item: Stored, wanted: Mapping[str, Any]) -> Fit:
        """The form in the goal's layout, or the error that says why not."""
        assert self.codec is not None
        shape = (item.target.out_features, item.target.in_features)
        if tuple(form.shape[-2:]) != shape:
            from quantmill.forms.convert import not_exact

            raise not_exact(item.target.name, f"it is stored as the transpose of {list(shape)}")
        return self.codec.fit(form, item.target, wanted)

    def fitted(self, step: Step, fit: Fit) -> Step:
        """An exact step."""
        assert self.codec is not None
        meta = fit.form.map_tensors(lambda tensor: tensor.to("meta"))
        config = self.goal.config().from_user({**self.goal.raw, **fit.options})
        return replace(
            step,
            kind="exact",
            result=describe_form(meta),
            reason="",
            unless=fit.unless,
            notes=fit.notes,
            bytes_after=encoded_bytes(self.codec(config), meta),
            options=dict(fit.options),
        )

    def _as_float(self, step: Step, item: Stored, form: Form, why: str) -> Step:
        """The values of a quantized module as floats."""
        job = self.job
        assert job.plan is not None
        kind, dtype = "float", getattr(torch, job.plan.dtype)
        if job.dtype is not None:
            kind = "dequantize"
        elif dtype != torch.float32 and not (self.read and _exact_in(form, dtype)):
            dtype = torch.float32
        name = str(dtype).removeprefix("torch.")
        return replace(
            step,
            kind=kind,
            result=name,
            reason="",
            unless=(),
            notes=(f"{why}; it becomes {name}",),
            bytes_after=item.target.weights * dtype.itemsize,
            options={},
            dtype=name,
        )


def _code(dtype: str) -> str:
    from quantmill.checkpoint.dtypes import code_of

    return code_of(getattr(torch, dtype))


def _exact_in(form: Form, dtype: torch.dtype) -> bool:
    count = max(1, (1 << 21) // max(1, form.shape[-1]))
    return all(
        torch.equal(block.to(dtype).to(torch.float32), block)
        for _, block in float_rows(form, count)
    )


def _uniform(steps: list[Step], survey: _Survey) -> list[Step]:
    """Let all exact steps share one config where one serves all of them: peers' formats prefer
    that, and some know nothing else."""
    by_options: dict[str, list[Step]] = {}
    for step in steps:
        if step.kind == "exact":
            by_options.setdefault(json.dumps(step.options, sort_keys=True), []).append(step)
    if len(by_options) < 2:
        return steps
    for key in sorted(by_options, key=lambda item: -len(by_options[item])):
        wanted = {**survey.goal.wanted, **_fields(survey, json.loads(key))}
        changed: dict[str, Step] = {}
        try:
            with open_reader(survey.job.headers) as survey.reader:
                for other, members in by_options.items():
                    for step in members if other != key else ():
                        item = survey.stored[step.name]
                        fit = survey.fit(survey.form(item).regular(), item, wanted)
                        changed[step.name] = survey.fitted(step, fit)
        except QuantmillError:
            continue
        uniform = [changed.get(step.name, step) for step in steps]
        same = {json.dumps(step.options, sort_keys=True) for step in changed.values()} == {key}
        # Not at any price: narrow codes fit into wide ones, which is no reason to widen them.
        size = sum(step.bytes_after for step in steps)
        if same and sum(step.bytes_after for step in uniform) <= size:
            return uniform
    return steps


def _fields(survey: _Survey, options: dict[str, Any]) -> dict[str, Any]:
    return survey.goal.config().normalise({**survey.goal.raw, **options})
