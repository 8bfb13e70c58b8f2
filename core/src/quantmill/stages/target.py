"""Stage 6, targeting, run before the work: a decision and exact bytes for every module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from quantmill.architecture import open_architecture
from quantmill.job import Job, Request
from quantmill.planning import ModulePlan, Plan
from quantmill.registrations import resolve
from quantmill.stages.measure import ModulePlanner, as_float
from quantmill.stages.peaks import loading_peak, writing_peak
from quantmill.stages.select import add_selection
from quantmill.targeting.rules import decide
from quantmill.targeting.types import Decision, ModuleInfo, Rule

__all__ = ["core_rules", "decisions_for", "make_plan"]


def core_rules(job: Job) -> Iterator[Rule]:
    """Rules of the architecture, the checkpoint's dialect, registered plugins and the user."""
    for plugin, item in job.host.targeting_rules:
        if not item.methods or {s.method.name for s in job.selections.values()} & set(item.methods):
            yield Rule(item.pattern, item.action, f"plugin:{plugin}", reason=item.reason)  # type: ignore[arg-type]
    for selection in job.selections.values():
        origin = "checkpoint" if job.prequantized else "user"
        for dialect in job.host.dialects:
            if dialect.method == selection.method.name and dialect.rules is not None:
                yield from resolve(dialect.rules)(selection.config, origin)
    yield from _user_rules(job.request, job)


def _user_rules(request: Request, job: Job) -> Iterator[Rule]:
    for pattern in request.skip:
        yield Rule(pattern, "skip", "user", reason="you asked to keep it")
    for pattern in request.include:
        yield Rule(pattern, "include", "user", reason="you asked to quantize it")
    for pattern, label in job.assigned.items():
        yield Rule(pattern, "assign", "user", method=label, reason=f"you assigned {label}")


def make_plan(job: Job, decided: Mapping[str, Decision] | None = None) -> Plan:
    """Decide for every module and count its bytes; fills ``job.architecture`` and ``job.plan``.

    Findings (unmatched patterns, ragged shapes, missing tensors) go to ``job.findings``.
    ``decided`` holds decisions by module that were made elsewhere, in the place of the rules'.
    """
    with job.stage("target"):
        architecture = job.architecture or open_architecture(job.host, job.headers, job.dtype)
        job.architecture = architecture
        job.findings.extend(architecture.findings())
        modules = list(architecture.modules)
        if decided is not None:
            decisions = [decided[item.name] for item in modules]
        else:
            decisions = decisions_for(job, modules)
        planner = ModulePlanner(job)
        plans = [
            part
            for module, decision in zip(modules, decisions, strict=True)
            for part in planner.module(module, decision)
        ]
        job.plan = Plan(
            source=job.headers.source.describe(),
            device=job.device,
            dtype=planner.dtype_name,
            methods={
                label: f"{item.method.name} {item.config.summary()}".strip()
                for label, item in job.selections.items()
            },
            modules=plans,
            findings=job.findings,
            loading_bytes=loading_peak(job, plans),
            writing_bytes=writing_peak(job, plans),
            calibrating_bytes=_calibrating(job, plans, planner.dtype.itemsize),
        )
        return job.plan


def _calibrating(job: Job, modules: list[ModulePlan], itemsize: int) -> int:
    if job.prequantized or not any(item.method.calibrator for item in job.selections.values()):
        return 0
    from quantmill.stages.calibrating import calibrating_bytes

    assert job.architecture is not None
    return calibrating_bytes(job, modules, job.architecture.settings, itemsize)


def decisions_for(job: Job, modules: list[ModuleInfo]) -> list[Decision]:
    """What the rules say of each module, in order; findings go to ``job.findings``."""
    if not job.selections:
        why = "no method was asked for"
        return [Decision(item.name, "keep", None, why, "user") for item in modules]
    kinds = {
        kind for item in job.selections.values() for kind in item.method.capabilities.target_kinds
    }
    rules = [rule for answer in job.host.hook.quantmill_target(job=job) for rule in answer]
    decisions, findings = decide(
        [as_float(item) for item in modules] if job.prequantized else modules,
        rules,
        kinds=kinds,
        allow_unmatched=job.options.allow_unmatched,
    )
    job.findings.extend(findings)
    return [_configured(job, item) for item in decisions]


def _configured(job: Job, decision: Decision) -> Decision:
    """Options of a rule become a selection of their own."""
    if not decision.options or decision.action != "quantize" or job.prequantized:
        return decision
    base = job.selections[decision.method or next(iter(job.selections))]
    fields = {**base.config.changed(), **decision.options}
    words = ", ".join(f"{key}={value}" for key, value in decision.options.items())
    made = replace(
        base, label=f"{base.label} ({words})", config=type(base.config).from_user(fields)
    )
    return replace(decision, method=add_selection(job, made))
