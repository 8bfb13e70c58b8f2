"""The pattern language: what each kind means, which is more specific, and how it refuses."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from quantmill.findings import Finding, QuantmillError
from quantmill.targeting.patterns import Pattern, parse
from quantmill.targeting.types import ROLES, ModuleInfo

UP = "model.layers.0.mlp.up_proj"


def module(
    name: str, *, cls: str = "Linear", role: str | None = None, layer: int | None = None
) -> ModuleInfo:
    return ModuleInfo(name, "linear", cls, {}, role, layer)


def matches(pattern: str, name: str) -> bool:
    return parse(pattern).matches(module(name), 0)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        # Names: the whole, a prefix or a suffix, each at the border of a component.
        (UP, [UP], [UP + "2", "x" + UP]),
        ("model.layers.1", ["model.layers.1", "model.layers.1.mlp.up"], ["model.layers.10.mlp.up"]),
        ("up_proj", [UP, "up_proj"], ["model.gup_proj", "model.up_proj2"]),
        ("mlp.up_proj", [UP], ["model.xmlp.up_proj", "mlp.up_proj_2"]),
        ("mlp", ["model.mlp", "mlp.up"], [UP]),
        ("a.b", [], ["axb"]),
        ("  lm_head ", ["lm_head"], []),
        # Globs: the whole name, `*` and `?` within a component.
        (
            "model.*.up",
            ["model.a.up", "model..up"],
            ["model.a.b.up", "x.model.a.up", "model.a.up."],
        ),
        ("model.**.up", ["model.a.up", "model.a.b.up"], ["model.up", "model.a.upper"]),
        ("**.up", ["a.up", "a.b.up"], ["up", "a.bup"]),
        ("**", ["", "a", "a.b.c"], []),
        ("layer.?", ["layer.1"], ["layer.12", "layer..", "layer."]),
        ("layer.[0-3]", ["layer.0", "layer.3"], ["layer.4", "layer.-"]),
        ("layer.[02-3]x", ["layer.0x", "layer.3x"], ["layer.1x"]),
        ("l[!0-8]", ["l9", "lx"], ["l0", "l.", "l"]),
        ("l[^ab]", ["lc"], ["la", "l."]),
        # What a regular expression would take for a sign is itself.
        ("l[a-]*", ["la", "l-x"], ["lb"]),
        (r"l[\d]*", ["ld", "l\\"], ["l1"]),
        ("l[[a]?", ["l[x", "lax"], ["lbx"]),
        ("a+b*", ["a+b"], ["aab"]),
        # Regular expressions: the whole name.
        ("re:.*down.*", ["x.down_proj", "down"], ["x.up_proj"]),
        ("re:up", ["up"], ["x.up", "up_proj"]),
        (r"re:layer\.(0|2)", ["layer.0"], ["layer.1", "layer.01"]),
        ("re: up|down ", ["up", "down"], ["up|down"]),
        (r"re:a\&b", ["a&b"], ["a"]),
        # Conjunction and negation.
        ("re:.*up.* & !**.1.**", ["x.0.up"], ["x.1.up", "x.0.down"]),
        ("a & b", ["a.b", "b.x.a"], ["a", "b", "x.a.b"]),
        ("a&b&!c", ["a.b"], ["a.c.b.c"]),
        ("!a", ["b"], ["a", "a.b"]),
        ("! ! a", ["a"], ["b"]),
        ("!!!a", ["b"], ["a"]),
    ],
)
def test_names_globs_and_expressions(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [name for name in yes if not matches(pattern, name)] == []
    assert [name for name in no if matches(pattern, name)] == []


def test_classes_and_roles() -> None:
    info = module(UP, cls="Linear", role="mlp")
    assert parse("cls:Linear").matches(info, 1) and parse("cls: Linear").matches(info, 1)
    assert not parse("cls:linear").matches(info, 1)
    assert not parse("cls:Line").matches(info, 1)
    assert parse("role:mlp").matches(info, 1)
    assert not parse("role:attention").matches(info, 1)
    assert not parse("role:mlp").matches(module(UP), 1)
    assert [role for role in ROLES if parse(f"role:{role}").matches(info, 1)] == ["mlp"]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("layers:0", [0]),
        ("layers:0-2,-1", [0, 1, 2, 5]),
        ("layers:-2--1", [4, 5]),
        ("layers:4--1", [4, 5]),
        ("layers: 1 , 3 ", [1, 3]),
        ("layers:5-100", [5]),
        ("layers:-100--6", [0]),
        ("layers:9", []),
        ("layers:-7", []),
        ("layers:1-4 & !layers:2-3", [1, 4]),
    ],
)
def test_layers(pattern: str, layers: list[int]) -> None:
    parsed = parse(pattern)
    assert [i for i in range(6) if parsed.matches(module("x", layer=i), 6)] == layers
    assert not parse("layers:0--1").matches(module("lm_head", layer=None), 6)


@pytest.mark.parametrize(
    ("pattern", "cause", "fix"),
    [
        ("", "empty", ""),
        ("   ", "empty", ""),
        ("re:(", "regular expression", ""),
        ("re:a{99999999999999}", "regular expression", ""),
        ("re:" + "(" * 5000 + ")" * 5000, "regular expression", ""),
        ("re:", "nothing follows re:", "re:.*down"),
        ("cls:", "nothing follows cls:", "cls:Linear"),
        ("role: ", "nothing follows role:", "role:mlp"),
        ("layers:", "nothing follows layers:", "layers:0-3"),
        ("a[bc", "'[' at 1 has no ']'", "close"),
        ("a[]", "allows no character", ""),
        ("a[!]", "allows no character", ""),
        ("a[z-a]", "reversed", "[a-z]"),
        ("kls:Linear", "'kls' is no kind", "did you mean cls:?"),
        ("a.b:c", "'a.b' is no kind", "use re:"),
        ("role:mpl", "'mpl' is no role", "did you mean role:mlp?"),
        ("role:Attention", "'Attention' is no role", "did you mean role:attention?"),
        ("role:xyzzy", "'xyzzy' is no role", "embedding"),
        ("layers:3-1", "'3-1' is reversed", "layers:1-3"),
        ("layers:0,-1--3", "'-1--3' is reversed", "layers:-3--1"),
        ("layers:1,", "'' is no layer", "layers:0-3"),
        ("layers:a", "'a' is no layer", ""),
        ("layers:1-2-3", "'1-2-3' is no layer", ""),
        ("layers:" + "9" * 5000, "is no layer", ""),
        ("&", "side of & is empty", ""),
        ("a &", "side of & is empty", ""),
        ("& a", "side of & is empty", ""),
        ("a & & b", "side of & is empty", ""),
        ("re:a&", "side of & is empty", ""),
        ("!", "nothing follows !", ""),
        ("a & !", "nothing follows !", ""),
        ("a & re:(", "regular expression", ""),
    ],
)
def test_malformed_patterns_are_refused_with_cause_and_fix(
    pattern: str, cause: str, fix: str
) -> None:
    with pytest.raises(QuantmillError) as caught:
        parse(pattern)
    (finding,) = caught.value.findings
    assert finding.code == "QM-TARGET-001"
    assert cause in finding.cause
    assert fix in finding.fix and finding.fix


def test_the_more_specific_wins() -> None:
    descending = [
        "model.layers.0.mlp & cls:Linear",
        "model.layers.0.mlp",
        "lm_head",
        "model.layers.*",
        "model.*",
        "m[odel]*",
        "m?*",
        "**",
        "re:.*mlp.*",
        "re:.*",
        "layers:0 & cls:Linear",
        "layers:0",
        "role:mlp",
        "cls:Linear",
        "!lm_head",
    ]
    ranks = [parse(pattern).specificity for pattern in descending]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) == len(ranks)


def test_characters_in_a_bracket_are_alternatives_not_literals() -> None:
    assert parse("x.[abcdefgh]*").specificity < parse("x.ab*").specificity
    assert parse("x.[0-3]").specificity > parse("x.?").specificity


# --- Properties --------------------------------------------------------------------------------

components = st.text("abq01_", min_size=1, max_size=3)
names = st.lists(components, min_size=1, max_size=4).map(".".join)
modules = st.builds(
    lambda name, cls, role, layer: module(name, cls=cls, role=role, layer=layer),
    names,
    st.sampled_from(["Linear", "Conv1D"]),
    st.sampled_from([None, *ROLES]),
    st.none() | st.integers(0, 5),
)
globs = st.lists(
    st.sampled_from(["a", "b", ".", "0", "*", "**", "?", "[a-b]", "[!a]"]), min_size=1, max_size=6
).map("".join)
atoms = st.one_of(
    names,
    globs,
    names.map(lambda name: f"re:{name}.*"),
    st.sampled_from(ROLES).map("role:{}".format),
    st.sampled_from(["cls:Linear", "cls:Conv1D"]),
    st.sampled_from(["layers:0", "layers:-1", "layers:1-3,-2--1"]),
)
patterns = st.builds(lambda signs, atom: "!" * signs + atom, st.integers(0, 3), atoms)


@given(modules)
def test_a_name_matches_itself_and_its_ends(info: ModuleInfo) -> None:
    parts = info.name.split(".")
    for index in range(1, len(parts) + 1):
        assert parse(".".join(parts[:index])).matches(info, 6)
        assert parse(".".join(parts[-index:])).matches(info, 6)


@given(modules)
def test_two_stars_match_everything(info: ModuleInfo) -> None:
    assert parse("**").matches(info, 6)


fragments = st.sampled_from(
    ["re:", "cls:", "layers:", "role:", "mlp", "19", *"&![]*?-,(){}\\|.^ 0azé\n"]
)


def parse_or_findings(text: str) -> Pattern | tuple[Finding, ...]:
    try:
        return parse(text)
    except QuantmillError as error:
        return error.findings


@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(st.one_of(st.text(max_size=40), st.lists(fragments, max_size=12).map("".join)))
def test_any_text_is_a_pattern_or_a_finding(text: str) -> None:
    read = parse_or_findings(text)
    if isinstance(read, Pattern):
        assert isinstance(read.matches(module("a.b"), 2), bool)
        assert len(read.specificity) == 2
    else:
        assert [item.code for item in read] == ["QM-TARGET-001"]


@given(patterns, modules)
def test_negation_is_the_complement(pattern: str, info: ModuleInfo) -> None:
    assert parse(f"!{pattern}").matches(info, 6) is not parse(pattern).matches(info, 6)


@given(patterns, patterns, modules)
def test_conjunction_is_the_intersection(left: str, right: str, info: ModuleInfo) -> None:
    both = parse(left).matches(info, 6) and parse(right).matches(info, 6)
    assert parse(f"{left} & {right}").matches(info, 6) is both


@given(st.lists(patterns, min_size=2, max_size=4), st.data())
def test_order_of_a_conjunction_does_not_matter(parts: list[str], data: st.DataObject) -> None:
    other = data.draw(st.permutations(parts))
    assert parse(" & ".join(parts)).specificity == parse("&".join(other)).specificity


@given(patterns, patterns)
def test_a_conjunction_is_more_specific_than_its_parts(left: str, right: str) -> None:
    both = parse(f"{left} & {right}").specificity
    assert both > max(parse(left).specificity, parse(right).specificity)


@given(patterns, modules)
def test_the_text_of_a_pattern_reads_as_the_same_pattern(pattern: str, info: ModuleInfo) -> None:
    parsed = parse(pattern)
    again = parse(str(parsed))
    assert again.specificity == parsed.specificity
    assert again.matches(info, 6) is parsed.matches(info, 6)


ends = st.integers(-6, 6)


@given(st.lists(st.tuples(ends, ends), min_size=1, max_size=3), st.integers(1, 6))
def test_layer_ranges_agree_with_a_model(ranges: list[tuple[int, int]], count: int) -> None:
    assume(all(first <= last for first, last in ranges if (first < 0) == (last < 0)))
    text = ",".join(f"{first}-{last}" for first, last in ranges)
    parsed = parse(f"layers:{text}")
    for layer in range(count):
        # A layer has two labels, from the front and from the back; each end speaks of one.
        label = {True: layer - count, False: layer}
        expected = any(
            label[first < 0] >= first and label[last < 0] <= last for first, last in ranges
        )
        assert parsed.matches(module("x", layer=layer), count) is expected


@given(st.lists(st.sampled_from(["a", "b", ".", "*", "**", "?"]), max_size=6), names)
def test_globs_agree_with_a_model(tokens: list[str], name: str) -> None:
    text = "".join(tokens)
    assume(set(text) & set("*?"))

    @lru_cache(None)
    def model(pattern: str, rest: str) -> bool:
        if not pattern:
            return not rest
        if pattern.startswith("**"):
            return any(model(pattern[2:], rest[cut:]) for cut in range(len(rest) + 1))
        if pattern[0] == "*":
            first = rest.split(".")[0]
            return any(model(pattern[1:], rest[cut:]) for cut in range(len(first) + 1))
        if not rest or (rest[0] == "." if pattern[0] == "?" else rest[0] != pattern[0]):
            return False
        return model(pattern[1:], rest[1:])

    assert matches(text, name) is model(text, name)
