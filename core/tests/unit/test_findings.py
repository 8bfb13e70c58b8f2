"""Findings are data: declared once, collected without repeats, raised together."""

from __future__ import annotations

import json

import pytest

from quantmill.findings import CODES, Finding, Findings, FindingsError, QuantmillError, Severity
from quantmill.findings import declare as declare_code


@pytest.fixture(autouse=True)
def _no_codes_stay() -> object:
    before = dict(CODES)
    yield
    CODES.clear()
    CODES.update(before)


def test_a_code_is_declared_once() -> None:
    code = declare_code("QM-UNITTEST-001", "a title")
    assert declare_code("QM-UNITTEST-001", "a title") == code
    with pytest.raises(ValueError, match="already declared as 'a title'"):
        declare_code("QM-UNITTEST-001", "another")
    with pytest.raises(ValueError, match="already declared"):
        declare_code("QM-UNITTEST-001", "a title", Severity.WARNING)
    assert CODES["QM-UNITTEST-001"] is code


@pytest.mark.parametrize("code", ["QM-X-1", "qm-x-001", "QM--001", "QM-X-0011", "X-001", ""])
def test_a_malformed_code_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        declare_code(code, "a title")


def test_an_occurrence_is_json_and_text() -> None:
    made = declare_code("QM-UNITTEST-002", "t", Severity.WARNING)("here", "why.", "do it", size=3)
    assert json.loads(json.dumps(made.to_dict())) == {
        "code": "QM-UNITTEST-002",
        "severity": "warning",
        "where": "here",
        "cause": "why.",
        "fix": "do it",
        "data": {"size": 3},
    }
    assert str(made) == "[QM-UNITTEST-002] here: why. Fix: do it"
    assert (
        str(Finding("QM-UNITTEST-002", Severity.INFO, "", "why.", "")) == "[QM-UNITTEST-002] why."
    )


def test_a_collection_keeps_order_and_no_repeats() -> None:
    code = declare_code("QM-UNITTEST-003", "t")
    first, second = code("b", "x", "y"), code("a", "x", "y")
    found = Findings([first, second])
    found.add(code("b", "x", "y", detail="data does not make it another finding"))
    found.extend([second, code("c", "x", "y")])
    assert [item.where for item in found] == ["b", "a", "c"]
    assert [item["where"] for item in found.to_list()] == ["b", "a", "c"]
    assert len(found) == 3


def test_only_errors_raise_and_all_of_them() -> None:
    error = declare_code("QM-UNITTEST-004", "t")
    warning = declare_code("QM-UNITTEST-005", "t", Severity.WARNING)
    info = declare_code("QM-UNITTEST-006", "t", Severity.INFO)
    calm = Findings([warning("w", "c", "f"), info("i", "c", "f")])
    calm.raise_errors()
    assert [item.where for item in calm.warnings] == ["w"]
    with pytest.raises(FindingsError) as caught:
        Findings([error("1", "c", "f"), *calm, error("2", "c", "f")]).raise_errors()
    assert isinstance(caught.value, QuantmillError)
    assert [item.where for item in caught.value.findings] == ["1", "2"]
    assert str(caught.value).splitlines() == [str(item) for item in caught.value.findings]


def test_strict_makes_fallbacks_errors_and_leaves_the_rest() -> None:
    fallback = declare_code("QM-UNITTEST-007", "t", Severity.WARNING, fallback=True)
    warning = declare_code("QM-UNITTEST-008", "t", Severity.WARNING)
    foreign = Finding("QM-UNDECLARED-001", Severity.WARNING, "x", "c", "f")
    found = Findings([fallback("a", "c", "f", n=1), warning("b", "c", "f"), foreign])
    strict = found.strict()
    assert [(item.where, item.severity) for item in strict] == [
        ("a", Severity.ERROR),
        ("b", Severity.WARNING),
        ("x", Severity.WARNING),
    ]
    assert next(iter(strict)).data == {"n": 1}
    assert found.errors == []
