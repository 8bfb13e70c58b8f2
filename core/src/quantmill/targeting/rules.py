"""Rules to decisions: the most specific rule wins, defaults stay in force, nothing is silent.

Origins rank, from the strongest: what the architecture demands (fp32 modules), the user, plugins,
the checkpoint, and the defaults (output head and tied weights stay float). A weaker origin's
*skip* stays in force unless a stronger one *includes* the module. Within one origin the more
specific pattern wins; equal ones that disagree are an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

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
    used: set[int] = set()
    decisions = [_one(item, parsed, kinds, layers, used, findings) for item in modules]
    for index, (_, rule) in enumerate(parsed):
        if index not in used and not rule.optional:
            _unmatched(rule, modules, allow_unmatched, findings)
    stacked = [item.name for item in modules if item.kind == "stacked" and "stacked" not in kinds]
    if stacked:
        findings.add(
            KIND_KEPT(
                stacked[0] + (f" and {len(stacked) - 1} more" if len(stacked) > 1 else ""),
                "these are stacked expert weights, which the method does not take",
                "choose a method that takes stacked targets",
            )
        )
    return decisions, findings


def _one(
    module: ModuleInfo,
    rules: Sequence[tuple[Pattern, Rule]],
    kinds: Collection[str],
    layers: int,
    used: set[int],
    findings: Findings,
) -> Decision:
    matching = []
    for index, (pattern, rule) in enumerate(rules):
        if pattern.matches(module, layers):
            used.add(index)
            matching.append((pattern, rule))
    name = module.name
    if not targets_of(module):
        return Decision(name, "not-a-target", None, f"{module.cls} has no weight matrix", "method")
    if module.kind not in kinds:
        action: Outcome = "keep" if module.kind == "stacked" else "not-a-target"
        reason = f"the method does not take modules of kind {module.kind}"
        return Decision(name, action, None, reason, "method")
    if module.keep_float:
        reason = "the architecture keeps it in fp32"
        return Decision(name, "keep", None, reason, "architecture")
    winner = _winner(module, matching, findings)
    if module.tied_to is not None:
        if winner is not None and winner.action != "skip" and winner.origin == "user":
            findings.add(
                TIED_INCLUDED(name, f"it shares its weight with {module.tied_to}", "leave it out")
            )
        return Decision(name, "keep", None, f"its weight is tied to {module.tied_to}", "default")
    if winner is None:
        if module.role == "head":
            return Decision(name, "keep", None, "the output head stays float", "default")
        return Decision(name, "quantize", None, "linear layer", "default")
    outcome = "keep" if winner.action == "skip" else "quantize"
    reason = winner.reason or f"pattern {winner.pattern}"
    return Decision(name, outcome, winner.method, reason, winner.origin, winner)  # type: ignore[arg-type]


def _winner(
    module: ModuleInfo, matching: Sequence[tuple[Pattern, Rule]], findings: Findings
) -> Rule | None:
    if not matching:
        return None
    ranked = sorted(
        matching,
        key=lambda item: (_rank(item[1]), item[1].order, item[0].specificity),
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
        if (rule.action, rule.method) != (best.action, best.method):
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
    names = [module.name for module in modules]
    words = {*names, *(name.rpartition(".")[2] for name in names)}
    close = difflib.get_close_matches(rule.pattern, sorted(words), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "see the names in the plan"
    cause = f"{rule.action} {rule.pattern!r} matches no module"
    if rule.origin != "user":
        findings.add(NO_MATCH_STORED(rule.pattern, cause, hint))
    elif not allowed:
        findings.add(NO_MATCH(rule.pattern, cause, f"{hint} Or allow unmatched patterns"))
