"""Per-token scores: negative log-likelihood, KL divergence and top-1 agreement.

Log-softmax is computed in float32, in chunks of rows so that the working memory stays bounded
whatever the vocabulary; sums over the vocabulary and over tokens are accumulated in float64.
All divergences and likelihoods are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare

__all__ = ["ROW_BYTES", "Estimate", "WindowScores", "ratio_estimate", "row_chunks", "score_window"]

ROW_BYTES: Final = 32 << 20
"""Bound in bytes on one float32 chunk of rows; about six of them live at the same time."""

NOT_FINITE = declare("QM-EVAL-020", "The model's logits contain NaN or infinity")
BAD_LOGITS = declare("QM-EVAL-021", "The model's logits do not have the expected shape")
BAD_TARGET = declare("QM-EVAL-022", "A token id lies outside the model's vocabulary")


@dataclass(frozen=True, slots=True)
class WindowScores:
    """Sums over the scored predictions of one window.

    Attributes:
        count: number of predictions.
        nll: sum of negative log-likelihoods, nats.
        kl: sum of KL(reference || model), nats; None without a reference.
        agree: number of predictions whose most likely token is the reference's; None without.
    """

    count: int
    nll: float
    kl: float | None = None
    agree: int | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean per token with its standard error (None with fewer than two windows)."""

    mean: float
    stderr: float | None

    def interval(self, z: float = 1.959964) -> tuple[float, float] | None:
        """Normal confidence interval ``mean -+ z * stderr``; the default z covers 95 %."""
        if self.stderr is None:
            return None
        return self.mean - z * self.stderr, self.mean + z * self.stderr


def row_chunks(rows: int, vocab: int, limit: int = ROW_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges ``(start, stop)`` over rows, each at most ``limit`` bytes of float32 (or one row)."""
    step = max(1, limit // max(1, 4 * vocab))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def score_window(
    logits: Tensor,
    targets: Tensor,
    *,
    where: str,
    reference: Callable[[int, int], Tensor] | None = None,
    collect: Callable[[Tensor], None] | None = None,
    row_bytes: int = ROW_BYTES,
) -> WindowScores:
    """Score the predictions of one window.

    Args:
        logits: floating [R, V], any device and dtype; row r predicts ``targets[r]``.
        targets: int64 [R] on any device.
        where: name of the window for errors.
        reference: ``(start, stop) -> float32 [stop - start, V]``, log-probabilities of the
            reference model for these rows.
        collect: receives float32 [r, V] CPU log-probabilities of this model, chunk by chunk in
            order of the rows.
        row_bytes: bound on a float32 chunk.

    Returns:
        Sums over the rows. ``kl`` is the sum of sum_v P(v) (log P(v) - log Q(v)), with P the
        reference; it is not clamped, so rounding may make it slightly negative. The models agree
        on a row if the token that this model finds most likely has the reference's largest
        log-probability.

    Raises:
        QuantmillError: ``QM-EVAL-020`` (NaN or infinity), ``QM-EVAL-021`` (shape; also a
            reference of another vocabulary), ``QM-EVAL-022`` (target outside the vocabulary).
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not logits.is_floating_point():
        raise QuantmillError(
            BAD_LOGITS(
                where,
                f"logits are {logits.dtype} {list(logits.shape)}, targets {list(targets.shape)}",
                "return floating logits [batch, time, vocabulary]",
            )
        )
    rows, vocab = logits.shape
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        bad = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
        raise QuantmillError(
            BAD_TARGET(
                where,
                f"token id {bad}, but the logits have {vocab} columns",
                "use the tokenizer that belongs to the model",
                token=bad,
                vocabulary=vocab,
            )
        )
    targets = targets.to(logits.device)
    nll = kl = 0.0
    agree = 0
    for start, stop in row_chunks(rows, vocab, row_bytes):
        log_q = _log_softmax(logits[start:stop], where, start)
        picked = log_q.gather(1, targets[start:stop].to(log_q.device)[:, None])
        nll -= float(picked.sum(dtype=torch.float64))
        if collect is not None:
            collect(log_q.cpu())
        if reference is not None:
            log_p = reference(start, stop)
            if log_p.shape != log_q.shape:
                raise QuantmillError(
                    BAD_LOGITS(
                        where,
                        f"the model has a vocabulary of {vocab}, the reference one of "
                        f"{log_p.shape[-1]}",
                        "compare models of the same vocabulary (padding included)",
                        vocabulary=vocab,
                        reference_vocabulary=log_p.shape[-1],
                    )
                )
            log_p = log_p.to(log_q.device)
            kl += _kl_sum(log_p, log_q)
            chosen = log_p.gather(1, log_q.argmax(dim=1, keepdim=True))
            agree += int((chosen >= log_p.amax(dim=1, keepdim=True)).sum())
    if reference is None:
        return WindowScores(rows, nll)
    return WindowScores(rows, nll, kl, agree)


def _log_softmax(logits: Tensor, where: str, start: int) -> Tensor:
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        row = int((~finite).any(dim=1).nonzero()[0, 0])
        values = logits[row][~finite[row]]
        raise QuantmillError(
            NOT_FINITE(
                where,
                f"{values.numel()} of {logits.shape[1]} logits of scored prediction "
                f"{start + row} are not finite (first: {float(values[0])})",
                "compute in bfloat16 or float32 instead of float16, or look for a broken scale "
                "among the quantized tensors",
                prediction=start + row,
            )
        )
    if logits.device.type == "mps":  # has no float64 for the sums
        logits = logits.cpu()
    return torch.log_softmax(logits.float(), dim=-1)


def _kl_sum(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over all rows of KL(P || Q), float64 accumulation; P may be zero, Q may not."""
    terms = torch.exp(log_p) * (log_p - log_q)
    return float(torch.where(log_p > -math.inf, terms, 0.0).sum(dtype=torch.float64))


def ratio_estimate(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Mean per token, with a standard error that treats whole windows as the samples.

    Tokens of one window depend on each other, so the windows are the independent units: with
    s the window sums, n the window counts and m = sum(s) / sum(n), the standard error is
    sqrt(W / (W - 1) * sum((s - m n)^2)) / sum(n). With equal counts this is the standard
    deviation of the window means over sqrt(W).

    Args:
        sums: per window, sum over its tokens.
        counts: per window, number of tokens; their total must be positive.
    """
    total = sum(counts)
    mean = math.fsum(sums) / total
    windows = len(sums)
    if windows < 2:
        return Estimate(mean, None)
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Estimate(mean, math.sqrt(windows / (windows - 1) * squares) / total)
