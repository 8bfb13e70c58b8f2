"""Windows and counts of the named protocols."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmill.evaluate import PROTOCOLS, get_protocol
from quantmill.findings import QuantmillError


def spans(name: str, n_tokens: int, context: int, **options: int) -> list[tuple[int, ...]]:
    """(start, stop, first target, target after the last) of every window."""
    windows = get_protocol(name).windows(n_tokens, context, **options)
    return [(w.input.start, w.input.stop, w.targets.start, w.targets.stop) for w in windows]


def test_blocks_by_hand() -> None:
    assert spans("blocks", 11, 4) == [(0, 4, 1, 4), (4, 8, 5, 8)]
    assert get_protocol("blocks").count(11, 4) == (2, 6)
    assert get_protocol("blocks").count(341_469, 2048) == (166, 166 * 2047)


def test_sliding_by_hand() -> None:
    assert spans("sliding", 9, 4) == [(0, 4, 1, 4), (2, 6, 4, 6), (4, 8, 6, 8), (6, 9, 8, 9)]
    assert spans("sliding", 8, 5) == [(0, 5, 1, 5), (2, 7, 5, 7), (4, 8, 7, 8)]
    assert spans("sliding", 4, 4) == [(0, 4, 1, 4)]


def test_llama_cpp_by_hand() -> None:
    assert spans("llama.cpp", 17, 8) == [(0, 8, 5, 8), (8, 16, 13, 16)]
    first = next(get_protocol("llama.cpp").windows(17, 8, bos_id=1))
    assert (first.score, first.bos_id) == (slice(4, 7), 1)
    # -c 512 scores 255 predictions per chunk
    assert get_protocol("llama.cpp").count(10_000, 512) == (19, 19 * 255)


@pytest.mark.parametrize("name", ["blocks", "sliding"])
def test_only_llama_cpp_replaces_the_first_token(name: str) -> None:
    assert all(w.bos_id is None for w in get_protocol(name).windows(20, 4, bos_id=1))


def test_max_windows() -> None:
    assert len(spans("sliding", 100, 10, max_windows=3)) == 3
    assert get_protocol("blocks").count(100, 10, 1000) == (10, 90)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(PROTOCOLS)), st.integers(3, 40), st.integers(0, 300))
def test_counts(name: str, context: int, extra: int) -> None:
    n_tokens = context + extra
    rule = PROTOCOLS[name]
    windows = list(rule.windows(n_tokens, context, bos_id=7))
    expected = {
        "blocks": (n_tokens // context, n_tokens // context * (context - 1)),
        "sliding": (1 + -(-extra // (context // 2)), n_tokens - 1),
        "llama.cpp": (n_tokens // context, n_tokens // context * (context - context // 2 - 1)),
    }[name]
    assert (
        rule.count(n_tokens, context) == expected == (len(windows), sum(w.scored for w in windows))
    )
    seen: set[int] = set()
    for index, window in enumerate(windows):
        assert window.index == index
        assert 0 <= window.score.start < window.score.stop <= window.length - 1
        assert window.length <= context
        targets = range(window.targets.start, window.targets.stop)
        assert len(targets) == window.scored and targets.stop <= window.input.stop
        assert seen.isdisjoint(targets)
        seen.update(targets)
    if name == "sliding":
        assert seen == set(range(1, n_tokens))


@pytest.mark.parametrize(
    ("name", "n_tokens", "context", "max_windows", "code"),
    [
        ("blocks", 10, 1, None, "QM-EVAL-002"),
        ("llama.cpp", 10, 2, None, "QM-EVAL-002"),
        ("blocks", 10, 5, 0, "QM-EVAL-002"),
        ("sliding", 4, 5, None, "QM-EVAL-003"),
        ("blocks", 0, 5, None, "QM-EVAL-003"),
    ],
)
def test_refusals_come_with_the_call(
    name: str, n_tokens: int, context: int, max_windows: int | None, code: str
) -> None:
    with pytest.raises(QuantmillError) as caught:
        get_protocol(name).windows(n_tokens, context, None, max_windows)
    assert caught.value.findings[0].code == code
    assert caught.value.findings[0].fix


def test_unknown_protocol_suggests() -> None:
    with pytest.raises(QuantmillError) as caught:
        get_protocol("llamacpp")
    assert caught.value.findings[0].code == "QM-EVAL-001"
    assert "llama.cpp" in caught.value.findings[0].fix
