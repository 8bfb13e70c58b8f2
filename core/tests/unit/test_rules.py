"""`decide`: one decision for every module, the most specific rule wins, nothing is silent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill.findings import CODES, Severity
from quantmill.targeting.patterns import parse
from quantmill.targeting.rules import decide
from quantmill.targeting.types import Decision, ModuleInfo, ParameterInfo, Rule

HEAD = "lm_head"


def module(name: str, kind: str = "linear", **more: Any) -> ModuleInfo:
    shape = {"norm": (8,), "stacked": (2, 8, 8)}.get(kind, (8, 8))
    classes = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding", "norm": "RMSNorm"}
    local = "up" if kind == "stacked" else "weight"
    weight = ParameterInfo(f"{name}.{local}", shape, "BF16", (f"{name}.{local}",))
    return ModuleInfo(name, kind, classes.get(kind, "Experts"), {local: weight}, **more)


MODEL = [
    module("model.embed", "embedding", role="embedding"),
    module("model.layers.0.attn.q", role="attention", layer=0),
    module("model.layers.0.mlp.up", role="mlp", layer=0),
    module("model.layers.0.norm", "norm", role="norm", layer=0),
    module("model.layers.1.attn.q", role="attention", layer=1),
    module("model.layers.1.mlp.up", role="mlp", layer=1),
    module(HEAD, role="head"),
]


def skip(pattern: str, origin: str = "user", **more: Any) -> Rule:
    return Rule(pattern, "skip", origin, **more)


def include(pattern: str, origin: str = "user", **more: Any) -> Rule:
    return Rule(pattern, "include", origin, **more)


def run(
    *rules: Rule, modules: Sequence[ModuleInfo] = MODEL, kinds: Sequence[str] = ("linear",)
) -> tuple[dict[str, Decision], list[tuple[str, str]]]:
    decisions, findings = decide(modules, rules, kinds=kinds)
    return {item.module: item for item in decisions}, [(f.code, f.where) for f in findings]


def quantized(decisions: dict[str, Decision]) -> list[str]:
    return [name for name, item in decisions.items() if item.action == "quantize"]


Q0, UP0, Q1, UP1 = (item.name for item in MODEL if item.kind == "linear" and item.role != "head")


def test_without_rules_the_defaults_decide() -> None:
    decisions, findings = run()
    assert quantized(decisions) == [Q0, UP0, Q1, UP1]
    assert findings == []
    assert {item.origin for item in decisions.values() if item.action == "quantize"} == {"default"}
    assert decisions[HEAD].action == "keep" and "head" in decisions[HEAD].reason
    assert decisions["model.embed"].action == "not-a-target"
    assert "embedding" in decisions["model.embed"].reason
    assert "RMSNorm" in decisions["model.layers.0.norm"].reason


def test_defaults_stay_in_force_when_a_user_adds_skips() -> None:
    decisions, findings = run(skip("layers:0", reason="first block"))
    assert quantized(decisions) == [Q1, UP1]
    assert (decisions[HEAD].action, decisions[HEAD].origin) == ("keep", "default")
    assert (decisions[Q0].reason, decisions[Q0].origin) == ("first block", "user")
    assert findings == []


def test_a_user_includes_what_the_defaults_and_weaker_origins_skip() -> None:
    stored = skip(HEAD, "checkpoint"), skip("role:mlp", "plugin:policy")
    decisions, _ = run(*stored)
    assert quantized(decisions) == [Q0, Q1]
    assert decisions[UP0].origin == "plugin:policy"
    decisions, findings = run(*stored, include("**"))
    assert quantized(decisions) == [Q0, UP0, Q1, UP1, HEAD]
    assert decisions[HEAD].rule is not None and decisions[HEAD].origin == "user"
    assert findings == []


def test_a_stronger_origin_outranks_specificity() -> None:
    rules = include(UP0, "checkpoint"), skip("cls:Linear", "plugin:a"), include("!a", "user")
    assert quantized(run(rules[0], rules[1])[0]) == []
    assert quantized(run(*rules)[0]) == [Q0, UP0, Q1, UP1, HEAD]


def test_within_an_origin_the_more_specific_rule_wins_in_any_order() -> None:
    rules = [skip("layers:0-1"), include("role:mlp & layers:0"), skip(UP0)]
    for order in (rules, rules[::-1]):
        decisions, _ = run(*order)
        assert quantized(decisions) == []
        assert decisions[UP0].rule == skip(UP0)
    assert quantized(run(*rules[:2])[0]) == [UP0]


def test_to_include_and_to_say_with_what_agree() -> None:
    rules = [include(HEAD), Rule(HEAD, "assign", "user", method="other")]
    for order in (rules, rules[::-1]):
        decisions, findings = run(*order)
        assert (decisions[HEAD].action, decisions[HEAD].method) == ("quantize", "other")
        assert findings == []


def test_a_tie_is_an_error_that_names_both() -> None:
    _, findings = decide(MODEL, [skip("re:.*attn.*"), include("re:.*[.]0.*")], kinds=["linear"])
    (tie,) = findings.errors
    assert (tie.code, tie.where) == ("QM-TARGET-012", Q0)
    assert "re:.*attn.*" in tie.cause and "re:.*[.]0.*" in tie.cause
    assert "specific" in tie.fix


@pytest.mark.parametrize(
    ("first", "second", "ties"),
    [
        (skip("role:mlp"), skip("role:mlp"), False),
        (skip("role:mlp"), include("role:mlp"), True),
        (skip("role:mlp"), include("role:mlp", "plugin:a"), False),
        (skip("role:mlp", "plugin:a"), include("role:mlp", "plugin:b"), True),
        (skip("role:mlp"), include("role:mlp & layers:0-1"), False),
        (
            Rule("role:mlp", "assign", "user", method="a"),
            Rule("role:mlp", "assign", "user", method="a"),
            False,
        ),
        (
            Rule("role:mlp", "assign", "user", method="a"),
            Rule("role:mlp", "assign", "user", method="b"),
            True,
        ),
        (include("role:mlp", options={"bits": 4}), include("role:mlp", options={"bits": 8}), True),
        (include("role:mlp", options={"bits": 4}), include("role:mlp", options={"bits": 4}), False),
        (include("role:mlp", options={}), include("role:mlp"), False),
        (skip("role:mlp", order=1), include("role:mlp"), False),
    ],
)
def test_only_equal_rules_that_disagree_tie(first: Rule, second: Rule, ties: bool) -> None:
    for rules in ((first, second), (second, first)):
        codes = {code for code, _ in run(*rules)[1]}
        assert codes == ({"QM-TARGET-012"} if ties else set())


def test_rules_of_a_first_match_dialect_are_taken_in_their_order() -> None:
    rules = [
        include("re:.*", "checkpoint", order=1),
        skip("re:.*attn.*", "checkpoint", order=3),
        skip(UP1, "checkpoint", order=2),
    ]
    assert quantized(run(*rules)[0]) == [UP0, HEAD]
    assert quantized(run(*rules, include("role:attention"))[0]) == [Q0, UP0, Q1, HEAD]
    vague = skip("cls:Linear", "checkpoint", order=4)
    assert quantized(run(*rules, vague, include(UP0, "checkpoint", order=1))[0]) == []


def test_configure_changes_options_and_decides_nothing() -> None:
    rules = [
        Rule("**", "configure", "checkpoint", options={"bits": 8, "group": 64}),
        Rule("role:mlp", "include", "checkpoint", options={"bits": 4}),
    ]
    decisions, findings = run(*rules)
    assert quantized(decisions) == [Q0, UP0, Q1, UP1]
    assert decisions[UP0].options == {"bits": 4, "group": 64}
    assert decisions[Q0].options == {"bits": 8, "group": 64}
    assert decisions[HEAD].action == "keep"
    assert findings == []


def test_a_skip_behind_a_configure_of_a_first_match_dialect_does_not_count() -> None:
    # GPTQModel's dynamic {"+:attn": {...}, "-:layers.0": {}}: attention of block 0 matched first.
    rules = [
        Rule("re:.*attn.*", "configure", "checkpoint", options={"bits": 8}, order=2),
        skip("re:.*layers.0.*", "checkpoint", order=1),
    ]
    decisions, _ = run(*rules)
    assert quantized(decisions) == [Q0, Q1, UP1]
    assert decisions[Q0].options == {"bits": 8}
    swapped = [
        Rule("re:.*attn.*", "configure", "checkpoint", options={"bits": 8}, order=1),
        skip("re:.*layers.0.*", "checkpoint", order=2),
    ]
    assert quantized(run(*swapped)[0]) == [Q1, UP1]
    assert quantized(run(*rules, skip("role:attention"))[0]) == [UP1]
    plain = skip("role:attention", "checkpoint")
    assert quantized(run(*rules, plain)[0]) == [UP1]


def test_assign_gives_the_method() -> None:
    decisions, _ = run(Rule("role:mlp", "assign", "user", method="other"), skip(Q0))
    assert [(name, decisions[name].method) for name in (Q0, UP0, Q1)] == [
        (Q0, None),
        (UP0, "other"),
        (Q1, None),
    ]
    with pytest.raises(ValueError, match="assigns no method"):
        Rule("a", "assign", "user")
    with pytest.raises(ValueError, match="action"):
        Rule("a", "drop", "user")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("model.layers.0.mpl.up", f"did you mean {UP0}?"),
        ("lm_haed", f"did you mean {HEAD}?"),
        ("cls:Liner", "did you mean cls:Linear?"),
        ("role:router", "the roles here are attention, embedding, head, mlp, norm."),
        ("layers:7", "the blocks here are 0-1."),
        ("zzzzzzzzzzzzz", "see the names in the plan."),
        ("cls:Linear & layers:9", "see the names in the plan."),
    ],
)
def test_a_users_pattern_without_a_match_is_an_error_with_a_suggestion(
    pattern: str, hint: str
) -> None:
    _, findings = decide(MODEL, [skip(pattern)], kinds=["linear"])
    (finding,) = findings.errors
    assert (finding.code, finding.where) == ("QM-TARGET-010", pattern)
    assert finding.fix == f"{hint} Or allow unmatched patterns"
    _, findings = decide(MODEL, [skip(pattern)], kinds=["linear"], allow_unmatched=True)
    assert len(findings) == 0


@pytest.mark.parametrize("origin", ["checkpoint", "plugin:policy"])
def test_other_origins_unmatched_patterns_are_warnings(origin: str) -> None:
    for allowed in (False, True):
        _, findings = decide(
            MODEL, [skip("lm_haed", origin)], kinds=["linear"], allow_unmatched=allowed
        )
        (finding,) = findings
        assert (finding.code, finding.severity) == ("QM-TARGET-011", Severity.WARNING)
        assert HEAD in finding.fix
    assert run(skip("lm_haed", origin, optional=True), skip("x", optional=True))[1] == []


def test_a_rule_that_is_outranked_has_matched_all_the_same() -> None:
    assert run(include("role:mlp"), skip(UP0), skip(UP1))[1] == []


def test_an_include_of_what_can_not_be_quantized_is_reported() -> None:
    for pattern in ("model.embed", "role:norm"):
        assert run(include(pattern))[1] == [("QM-TARGET-015", pattern)]
    assert run(skip("model.embed"), include("!role:mlp"), include("norm", "plugin:a"))[1] == []
    assert run(include("model.embed"), kinds=["linear", "embedding"])[1] == []
    # Asked was to quantize, and that is not done: strict mode refuses.
    assert CODES["QM-TARGET-015"].fallback


def test_tied_weights_stay_float_and_including_one_is_an_error() -> None:
    head = module(HEAD, role="head", tied_to="model.embed.weight")
    model = [*MODEL[:-1], head]
    decisions, findings = run(skip("layers:0"), modules=model)
    assert decisions[HEAD].action == "keep" and "model.embed.weight" in decisions[HEAD].reason
    assert findings == []
    decisions, findings = run(include("**"), modules=model)
    assert decisions[HEAD].action == "keep"
    assert findings == [("QM-TARGET-013", HEAD)]
    assert run(include(HEAD, "checkpoint"), modules=model)[1] == []


def test_what_the_architecture_keeps_float_no_rule_changes() -> None:
    kept = module("wo", keep_float=True)
    decisions, findings = run(include("wo"), modules=[*MODEL, kept])
    assert (decisions["wo"].action, decisions["wo"].origin) == ("keep", "architecture")
    assert "fp32" in decisions["wo"].reason
    assert findings == [("QM-TARGET-015", "wo")]
    assert run(include("**"), modules=[*MODEL, kept])[1] == []


@pytest.mark.parametrize("kind", ["stacked", "conv1d"])
def test_float_weights_of_a_kind_the_method_does_not_take_are_reported(kind: str) -> None:
    model = [*MODEL, module("a.experts", kind), module("b.experts", kind)]
    decisions, findings = run(modules=model)
    assert decisions["a.experts"].action != "quantize"
    assert kind in decisions["a.experts"].reason and decisions["a.experts"].origin == "method"
    assert findings == [("QM-TARGET-014", "a.experts and 1 more")]
    decisions, findings = run(modules=model, kinds=["linear", kind])
    assert decisions["a.experts"].action == "quantize" and kind in decisions["a.experts"].reason
    assert findings == []


def test_a_weight_that_is_not_float_is_no_target() -> None:
    weight = ParameterInfo("q.weight", (8, 8), "U8", ("q.weight",))
    decisions, _ = run(
        include("q"), modules=[ModuleInfo("q", "linear", "Linear", {"weight": weight})]
    )
    assert decisions["q"].action == "not-a-target"


# --- Properties --------------------------------------------------------------------------------

components = st.sampled_from(["a", "b", "q", "up", "0", "1"])
names = st.lists(components, min_size=1, max_size=4).map(".".join)
trees = st.lists(names, min_size=1, max_size=6, unique=True).flatmap(
    lambda found: st.tuples(
        *(
            st.builds(
                module,
                st.just(name),
                st.sampled_from(["linear", "linear", "conv1d", "embedding", "norm", "stacked"]),
                role=st.sampled_from([None, "mlp", "head"]),
                layer=st.none() | st.integers(0, 2),
                tied_to=st.sampled_from([None, None, None, "other.weight"]),
                keep_float=st.sampled_from([False, False, False, True]),
            )
            for name in found
        )
    )
)
patterns = st.one_of(
    names,
    st.sampled_from(["**", "*", "**.up", "cls:Linear", "role:mlp", "layers:0", "!a", "a & up"]),
)
rules = st.lists(
    st.builds(
        Rule,
        patterns,
        st.sampled_from(["include", "skip", "assign", "configure"]),
        st.sampled_from(["user", "plugin:p", "checkpoint"]),
        method=st.just("m"),
        order=st.integers(0, 2),
    ),
    max_size=5,
)


@given(trees, rules)
def test_every_module_gets_one_decision_with_a_reason(
    tree: tuple[ModuleInfo, ...], given_rules: list[Rule]
) -> None:
    kinds = ["linear", "embedding"]
    decisions, findings = decide(tree, given_rules, kinds=kinds)
    assert [item.module for item in decisions] == [item.name for item in tree]
    layers = 1 + max((item.layer for item in tree if item.layer is not None), default=-1)
    for info, decision in zip(tree, decisions, strict=True):
        assert decision.reason and decision.origin
        if decision.action == "quantize":
            assert info.kind in kinds and not info.keep_float
            # A tied weight only where a rule asks for the embedding, whose storage it is.
            assert info.tied_to is None or (info.kind == "embedding" and decision.rule is not None)
        else:
            assert decision.method is None or decision.rule is not None
        if decision.rule is not None:
            assert parse(decision.rule.pattern).matches(info, layers)
            assert (decision.rule.action == "skip") == (decision.action == "keep")
            assert decision.origin == decision.rule.origin
    assert {item.code for item in findings} <= {f"QM-TARGET-01{digit}" for digit in range(6)}


@given(trees, rules, st.randoms(use_true_random=False))
def test_the_order_in_which_rules_are_listed_does_not_decide(
    tree: tuple[ModuleInfo, ...], given_rules: list[Rule], random: Any
) -> None:
    def outcome(listed: list[Rule]) -> tuple[list[tuple[str, str | None]], set[tuple[str, str]]]:
        decisions, findings = decide(tree, listed, kinds=["linear"])
        tied = {item.where for item in findings if item.code == "QM-TARGET-012"}
        return (
            [(item.action, item.method) for item in decisions if item.module not in tied],
            {(item.code, item.where) for item in findings},
        )

    shuffled = list(given_rules)
    random.shuffle(shuffled)
    assert outcome(shuffled) == outcome(given_rules)


@given(trees, rules, patterns)
def test_another_skip_never_quantizes_more(
    tree: tuple[ModuleInfo, ...], given_rules: list[Rule], pattern: str
) -> None:
    def names_of(listed: list[Rule]) -> set[str]:
        decisions, _ = decide(tree, listed, kinds=["linear"])
        return {item.module for item in decisions if item.action == "quantize"}

    assert names_of([*given_rules, skip(pattern)]) <= names_of(given_rules)
