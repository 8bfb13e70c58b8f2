"""Scores against plain loops in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from quantmill.evaluate.metrics import ratio_estimate, row_chunks, score_window
from quantmill.findings import QuantmillError


def plain_log_probs(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


def plain(p: Tensor, q: Tensor, targets: Tensor) -> tuple[float, float, int]:
    """nll of q, KL(p || q), agreements."""
    nll = kl = 0.0
    agree = 0
    for row_p, row_q, target in zip(p.tolist(), q.tolist(), targets.tolist(), strict=True):
        log_p, log_q = plain_log_probs(row_p), plain_log_probs(row_q)
        nll -= log_q[target]
        kl += math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        agree += log_p.index(max(log_p)) == log_q.index(max(log_q))
    return nll, kl, agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("row_bytes", [1, 4 * 50 * 3, 1 << 20])
def test_scores_match_plain_loops(dtype: torch.dtype, row_bytes: int) -> None:
    torch.manual_seed(0)
    p = torch.randn(17, 50) * 4
    q = (p + 0.3 * torch.randn(17, 50)).to(dtype)
    targets = torch.randint(0, 50, (17,))
    log_p = torch.log_softmax(p, -1)
    collected: list[Tensor] = []
    scores = score_window(
        q,
        targets,
        where="window 0",
        reference=lambda start, stop: log_p[start:stop],
        collect=collected.append,
        row_bytes=row_bytes,
    )
    nll, kl, agree = plain(p, q, targets)
    assert scores.count == 17
    assert scores.nll == pytest.approx(nll, abs=2e-5)
    assert scores.kl == pytest.approx(kl, abs=2e-5)
    assert scores.agree == agree < 17
    torch.testing.assert_close(torch.cat(collected), torch.log_softmax(q.float(), -1))


def test_zero_probability_in_the_reference_counts_nothing() -> None:
    log_p = torch.tensor([[0.0, -math.inf]])
    scores = score_window(
        torch.zeros(1, 2), torch.tensor([0]), where="w", reference=lambda a, b: log_p[a:b]
    )
    assert scores.kl == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_name_the_window(bad: float) -> None:
    logits = torch.zeros(5, 8)
    logits[3, 2] = bad
    with pytest.raises(QuantmillError) as caught:
        score_window(logits, torch.zeros(5, dtype=torch.int64), where="window 4", row_bytes=64)
    finding = caught.value.findings[0]
    assert (finding.code, finding.where) == ("QM-EVAL-020", "window 4")
    assert finding.data == {"prediction": 3}


def test_bad_shapes_and_targets() -> None:
    def code(logits: Tensor, targets: list[int], reference: Tensor | None = None) -> str:
        with pytest.raises(QuantmillError) as caught:
            score_window(
                logits,
                torch.tensor(targets),
                where="w",
                reference=None if reference is None else lambda a, b: reference[a:b],
            )
        return caught.value.findings[0].code

    assert code(torch.zeros(2, 4), [0]) == "QM-EVAL-021"
    assert code(torch.zeros(1, 4, dtype=torch.int64), [0]) == "QM-EVAL-021"
    assert code(torch.zeros(1, 4), [0], torch.zeros(1, 5)) == "QM-EVAL-021"
    assert code(torch.zeros(1, 4), [4]) == "QM-EVAL-022"
    assert code(torch.zeros(2, 4), [0, -1]) == "QM-EVAL-022"


def test_row_chunks_cover_all_rows() -> None:
    assert list(row_chunks(5, 10, limit=80)) == [(0, 2), (2, 4), (4, 5)]
    assert list(row_chunks(2, 1000, limit=1)) == [(0, 1), (1, 2)]
    assert list(row_chunks(0, 10)) == []


def test_estimate_with_equal_windows_is_the_textbook_one() -> None:
    means = [1.0, 2.5, 2.0, 4.0]
    estimate = ratio_estimate([m * 7 for m in means], [7] * 4)
    assert estimate.mean == pytest.approx(statistics.mean(means))
    assert estimate.stderr == pytest.approx(statistics.stdev(means) / 2)
    low, high = estimate.interval(2.0) or (0, 0)
    assert high - low == pytest.approx(4 * statistics.stdev(means) / 2)


def test_estimate_with_one_window_or_unequal_ones() -> None:
    assert ratio_estimate([3.0], [2]).stderr is None
    assert ratio_estimate([3.0], [2]).interval() is None
    unequal = ratio_estimate([2.0, 9.0], [2, 3])
    assert unequal.mean == pytest.approx(11 / 5)
    assert unequal.stderr == pytest.approx(math.sqrt(2 * 2 * 2.4**2) / 5)
