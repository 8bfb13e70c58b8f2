"""Rules to decisions: the most specific rule wins, defaults stay in force, nothing is silent.

Origins rank, from the strongest: what the architecture demands (fp32 modules), the user, plugins,
the checkpoint, and the defaults (output head, routers and tied weights stay float). A weaker
origin's *skip* stays in force unless a stronger one *includes* the module. Within one origin the
more specific pattern wins; equal ones that disagree are an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from quantmill.config import suggestion
from quantmill.findings import Findings, Severity, declare
from quantmill.targeting.patterns import Pattern, parse
from quantmill.targeting.types import Decision, ModuleInfo, Outcome, Rule, targets_of

__all__ = ["decide"]

NO_MATCH = declare("QM-TARGET-010", "A pattern of the user matches no module")
NO_MATCH_STORED = declare(
    "QM-TARGET-011", "A pattern of the checkpoint or a plugin matches no module", Severity.WARNING
)
TIE = declare("QM-TARGET-012", "Two equally specific rules disagree about a module")
TIED_INCLUDED = declare("QM-TARGET-013", "A weight that two modules share can't be quantized")
KIND_KEPT = declare(
    "QM-TARGET-014", "Modules of a kind that the method does not take stay float", Severity.WARNING
)
NOTHING_INCLUDED = declare(
    "QM-TARGET-015",
    "A pattern of the user includes only modules that can't be quantized",
    Severity.WARNING,
    fallback=True,
)

_REPORTED = {"stacked": "stacked expert weights", "conv1d": "transposed linears (Conv1D)"}
"""Kinds whose float weights would surprise; of embeddings, most methods take none."""
_ROUTER_STAYS = "the router stays float"
_RANK = {"user": 3, "plugin": 2, "checkpoint": 1}


def _rank(rule: Rule) -> int:
    return _RANK.get(rule.origin.partition(":")[0], 0)


def decide(
    modules: Sequence[ModuleInfo],
    rules: Sequence[Rule],
    *,
    kinds: Collection[str],
    allow_unmatched: bool = False,
) -> tuple[list[Decision], Findings]:
    """One decision per module, in order, and what is wrong with the rules.

    Args:
        modules: every module of the model.
        rules: of the user, the checkpoint and plugins; defaults are applied here.
        kinds: kinds of targets the method takes.
        allow_unmatched: a user's pattern may match nothing.
    """
    findings = Findings()
    parsed = [(parse(rule.pattern), rule) for rule in rules]
    layers = 1 + max((item.layer for item in modules if item.layer is not None), default=-1)
    used: dict[int, bool] = {}
    decisions = [_one(item, parsed, kinds, layers, used, findings) for item in modules]
    for index, (_, rule) in enumerate(parsed):
        if rule.optional:
            continue
        if index not in used:
            _unmatched(rule, modules, allow_unmatched, findings)
        elif not used[index] and rule.origin == "user" and rule.action != "skip":
            findings.add(
                NOTHING_INCLUDED(
                    rule.pattern,
                    f"{rule.action} {rule.pattern!r} matches only modules without a weight that"
                    " can be quantized",
                    "see the reasons in the plan, or leave the pattern out",
                )
            )
    for kind, words in _REPORTED.items():
        kept = [item.name for item in modules if item.kind == kind and targets_of(item)]
        if kept and kind not in kinds:
            findings.add(
                KIND_KEPT(
                    kept[0] + (f" and {len(kept) - 1} more" if len(kept) > 1 else ""),
                    f"these are {words}, which the method does not take",
                    f"choose a method that takes {kind} targets",
                )
            )
    return decisions, findings


def _one(
    module: ModuleInfo,
    rules: Sequence[tuple[Pattern, Rule]],
    kinds: Collection[str],
    layers: int,
    used: dict[int, bool],
    findings: Findings,
) -> Decision:
    matching = []
    able = bool(targets_of(module)) and module.kind in kinds and not module.keep_float
    for index, (pattern, rule) in enumerate(rules):
        if pattern.matches(module, layers):
            used[index] = used.get(index, False) or able
            matching.append((pattern, rule))
    name = module.name
    if not targets_of(module):
        if module.role == "router" and any(len(p.shape) == 2 for p in module.parameters.values()):
            # Named among what is kept: where readers have a linear layer here, they would
            # otherwise look for its scales.
            return Decision(name, "keep", None, _ROUTER_STAYS, "default")
        return Decision(name, "not-a-target", None, f"{module.cls} has no weight matrix", "method")
    if module.kind not in kinds:
        action: Outcome = "keep" if module.kind == "stacked" else "not-a-target"
        reason = f"the method does not take modules of kind {module.kind}"
        return Decision(name, action, None, reason, "method")
    if module.keep_float:
        reason = "the architecture keeps it in fp32"
        return Decision(name, "keep", None, reason, "architecture")
    configuring = [item for item in matching if item[1].action == "configure"]
    configured = _winner(module, configuring, findings)
    deciding = [
        (pattern, rule)
        for pattern, rule in matching
        if rule.action != "configure" and not _came_later(rule, configured)
    ]
    winner = _winner(module, deciding, findings)
    options = _options(winner, configured)
    if module.tied_to is not None and not _shareable(module, winner, kinds):
        if winner is not None and winner.action != "skip" and winner.origin == "user":
            findings.add(
                TIED_INCLUDED(name, f"it shares its weight with {module.tied_to}", "leave it out")
            )
        return Decision(name, "keep", None, f"its weight is tied to {module.tied_to}", "default")
    if winner is None:
        if module.role == "head":
            return Decision(name, "keep", None, "the output head stays float", "default")
        if module.role == "router":
            # Few weights, and an error here sends tokens to other experts.
            return Decision(name, "keep", None, _ROUTER_STAYS, "default")
        words = "linear layer" if module.kind == "linear" else f"{module.kind} weight"
        return Decision(name, "quantize", None, words, "default", options=options)
    outcome = "keep" if winner.action == "skip" else "quantize"
    reason = winner.reason or f"pattern {winner.pattern}"
    return Decision(name, outcome, winner.method, reason, winner.origin, winner, options)  # type: ignore[arg-type]


def _shareable(module: ModuleInfo, winner: Rule | None, kinds: Collection[str]) -> bool:
    """Whether a tied weight is to be quantized: an embedding that has the storage, included by a
    rule, of a method that computes with it in both places."""
    if winner is None or winner.action == "skip" or module.kind != "embedding":
        return False
    return bool(module.parameters["weight"].sources) and {"embedding", "linear"} <= set(kinds)


def _came_later(rule: Rule, configured: Rule | None) -> bool:
    """Whether a skip stands behind a ``configure`` in a dialect where the first match decides."""
    return (
        configured is not None
        and rule.action == "skip"
        and _rank(rule) == _rank(configured)
        and 0 < rule.order < configured.order
    )


def _options(winner: Rule | None, configured: Rule | None) -> Mapping[str, Any] | None:
    """The winner's own options over those of the best ``configure`` rule."""
    joined = {
        **((configured.options if configured is not None else None) or {}),
        **((winner.options if winner is not None else None) or {}),
    }
    return joined or None


def _winner(
    module: ModuleInfo, matching: Sequence[tuple[Pattern, Rule]], findings: Findings
) -> Rule | None:
    if not matching:
        return None
    ranked = sorted(
        matching,
        # To include a module and to say with what is no contradiction: the latter says more.
        key=lambda item: (
            _rank(item[1]),
            item[1].order,
            item[0].specificity,
            item[1].action == "assign",
        ),
        reverse=True,
    )
    best_pattern, best = ranked[0]
    for pattern, rule in ranked[1:]:
        if (_rank(rule), rule.order, pattern.specificity) != (
            _rank(best),
            best.order,
            best_pattern.specificity,
        ):
            break
        if best.action == "assign" and rule.action == "include" and not rule.options:
            continue
        if (rule.action, rule.method, rule.options or {}) != (
            best.action,
            best.method,
            best.options or {},
        ):
            findings.add(
                TIE(
                    module.name,
                    f"{best.action} {best.pattern!r} and {rule.action} {rule.pattern!r} are"
                    " equally specific",
                    "make one of them more specific",
                )
            )
    return best


def _unmatched(
    rule: Rule, modules: Sequence[ModuleInfo], allowed: bool, findings: Findings
) -> None:
    hint = _hint(rule.pattern, modules)
    cause = f"{rule.action} {rule.pattern!r} matches no module"
    if rule.origin != "user":
        findings.add(NO_MATCH_STORED(rule.pattern, cause, hint))
    elif not allowed:
        findings.add(NO_MATCH(rule.pattern, cause, f"{hint} Or allow unmatched patterns"))


def _hint(pattern: str, modules: Sequence[ModuleInfo]) -> str:
    kind, _, value = pattern.strip().partition(":") if "&" not in pattern else ("", "", "")
    if kind == "role":
        roles = sorted({module.role for module in modules if module.role is not None})
        return f"the roles here are {', '.join(roles) or 'unknown'}."
    if kind == "layers":
        last = max((module.layer for module in modules if module.layer is not None), default=None)
        return "no module is in a block." if last is None else f"the blocks here are 0-{last}."
    if kind == "cls":
        words, wanted, prefix = {module.cls for module in modules}, value.strip(), "cls:"
    else:
        names = [module.name for module in modules]
        words, wanted, prefix = {*names, *(name.rpartition(".")[2] for name in names)}, pattern, ""
    near = suggestion(wanted, sorted(words), cutoff=0.5, form=f"{prefix}{{}}")
    return near or "see the names in the plan."
