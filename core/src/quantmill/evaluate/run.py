"""Running an evaluation: windows through a model, scores into a result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from quantmill.evaluate.metrics import Estimate, WindowScores, ratio_estimate, score_window
from quantmill.evaluate.protocols import DEFAULT_CONTEXT, Protocol, Window, get_protocol
from quantmill.evaluate.reference import ReferenceLogits, ReferenceSpec
from quantmill.evaluate.writer import ReferenceWriter
from quantmill.findings import QuantmillError, declare

__all__ = ["EvalResult", "ModelFn", "Progress", "evaluate", "token_batch"]

ModelFn: TypeAlias = Callable[[Tensor], Tensor]
"""Token ids int64 [B, T] to logits [B, T, V] of any floating dtype."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with (windows done, windows in total, message)."""

MISMATCH = declare("QM-EVAL-011", "The reference belongs to another evaluation")
BAD_TOKENS = declare("QM-EVAL-030", "The token sequence is not int64 [n]")
BAD_OUTPUT = declare("QM-EVAL-031", "The model's output is not logits [batch, time, vocabulary]")


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation measured. Divergences and likelihoods are in nats per scored token.

    Attributes:
        protocol: name of the protocol.
        context: window length in tokens.
        windows: number of windows.
        tokens: number of scored predictions.
        perplexity: exp(nll); infinity where that exceeds a float64.
        nll: mean negative log-likelihood.
        nll_stderr: its standard error over windows; None with fewer than two windows.
        kl_mean: mean KL(reference || model); None without a reference.
        kl_stderr: its standard error over windows; None without reference or second window.
        top1_agreement: share (0 to 1) of predictions with the reference's most likely token.
        seconds: wall-clock time of the evaluation.
    """

    protocol: str
    context: int
    windows: int
    tokens: int
    perplexity: float
    nll: float
    nll_stderr: float | None
    kl_mean: float | None
    kl_stderr: float | None
    top1_agreement: float | None
    seconds: float

    def perplexity_interval(self, z: float = 1.959964) -> tuple[float, float] | None:
        """Confidence interval of the perplexity, exp of that of ``nll``; z = 1.96 covers 95 %."""
        bounds = Estimate(self.nll, self.nll_stderr).interval(z)
        return None if bounds is None else (_exp(bounds[0]), _exp(bounds[1]))

    def kl_interval(self, z: float = 1.959964) -> tuple[float, float] | None:
        """Confidence interval of ``kl_mean``, nats; None without reference or second window."""
        if self.kl_mean is None:
            return None
        return Estimate(self.kl_mean, self.kl_stderr).interval(z)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        return asdict(self)


def evaluate(
    model_fn: ModelFn,
    tokens: Tensor,
    *,
    protocol: str | Protocol = "blocks",
    context: int = DEFAULT_CONTEXT,
    max_windows: int | None = None,
    bos_id: int | None = None,
    reference: ReferenceLogits | None = None,
    collect_reference: ReferenceWriter | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure perplexity and, against a reference, KL divergence and top-1 agreement.

    Args:
        model_fn: int64 [B, T] on the device of ``tokens`` -> floating logits [B, T, V] on any
            device. It is called without gradients; all windows of a call have one length.
        tokens: int64 [n], the whole text, with a leading BOS if the tokenizer adds one.
        protocol: a name in :data:`PROTOCOLS` or a protocol of the caller's own.
        context: window length in tokens.
        max_windows: evaluate only the first windows.
        bos_id: BOS id if the tokenizer adds one; only ``llama.cpp`` uses it.
        reference: distributions of the float model over the same windows.
        collect_reference: receives this model's distributions; the caller commits it, usually
            by leaving its ``with`` block.
        batch_size: windows per call of the model.
        progress: told about every finished window.

    Raises:
        QuantmillError: ``QM-EVAL-001`` to ``003`` (protocol, context, too few tokens), ``011``
            (reference or writer made for other tokens or options), ``012`` to ``014`` (reference
            file), ``020`` to ``022`` (logits not finite or of a wrong shape, token ids outside
            the vocabulary), ``030`` (tokens), ``031`` (output of the model).
        ValueError: batch_size below 1.
    """
    started = time.monotonic()
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, it must be at least 1")
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        cause = f"tokens are {tokens.dtype} {list(tokens.shape)}"
        fix = "pass the ids of one text as a one-dimensional int64 tensor"
        raise QuantmillError(BAD_TOKENS("tokens", cause, fix))
    rule = get_protocol(protocol)
    windows = list(rule.windows(tokens.numel(), context, bos_id, max_windows))
    if reference is not None or collect_reference is not None:
        options: dict[str, Any] = {"context": context, "max_windows": max_windows}
        mine = ReferenceSpec.of("", tokens, protocol=rule, bos_id=bos_id, **options)
        _match(mine, reference)
        _match(mine, collect_reference)
    scores: list[WindowScores] = []
    if progress is not None:
        progress(0, len(windows), f"{rule.name}, context {context}")
    with torch.no_grad():
        for group in _batches(windows, batch_size):
            logits = _forward(model_fn, tokens, group)
            for row, window in enumerate(group):
                read = None
                if reference is not None:
                    read = partial(reference.log_probs, window.index)
                scores.append(
                    score_window(
                        logits[row, window.score],
                        tokens[window.targets],
                        where=f"window {window.index}",
                        reference=read,
                        collect=None if collect_reference is None else collect_reference.add,
                    )
                )
                if progress is not None:
                    done = len(scores)
                    progress(done, len(windows), f"perplexity {_running(scores):.4f}")
            del logits  # before the next forward pass
    return _result(rule.name, context, scores, time.monotonic() - started)


def _match(mine: ReferenceSpec, other: ReferenceLogits | ReferenceWriter | None) -> None:
    if other is not None and (differences := mine.difference(other.spec)):
        raise QuantmillError(
            MISMATCH(
                str(other.path),
                "this evaluation and the reference differ in " + "; ".join(differences),
                "use the same text, tokenizer, protocol, context and number of windows for both",
            )
        )


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most ``batch_size`` at a time."""
    group: list[Window] = []
    for window in windows:
        if group and (len(group) == batch_size or window.length != group[0].length):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _forward(model_fn: ModelFn, tokens: Tensor, group: Sequence[Window]) -> Tensor:
    """Logits [B, T, V] of windows of one length T."""
    batch = token_batch(tokens, group)
    logits: object = model_fn(batch)
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == batch.shape:
        return logits
    what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise QuantmillError(
        BAD_OUTPUT(
            f"window {group[0].index}",
            f"for ids {list(batch.shape)} the model returned {what}",
            "return the logits of every position, [batch, time, vocabulary]",
        )
    )


def token_batch(tokens: Tensor, group: Sequence[Window]) -> Tensor:
    """Token ids of windows of one length T, int64 [B, T]."""
    batch = torch.stack([tokens[window.input] for window in group])
    for row, window in enumerate(group):
        if window.bos_id is not None:
            batch[row, 0] = window.bos_id
    return batch


def _running(scores: Sequence[WindowScores]) -> float:
    return _exp(math.fsum(item.nll for item in scores) / sum(item.count for item in scores))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _result(
    protocol: str, context: int, scores: Sequence[WindowScores], seconds: float
) -> EvalResult:
    counts = [item.count for item in scores]
    nll = ratio_estimate([item.nll for item in scores], counts)
    kl: Estimate | None = None
    top1: float | None = None
    if scores[0].kl is not None:
        kl = ratio_estimate([item.kl or 0.0 for item in scores], counts)
        top1 = sum(item.agree or 0 for item in scores) / sum(counts)
    return EvalResult(
        protocol=protocol,
        context=context,
        windows=len(scores),
        tokens=sum(counts),
        perplexity=_exp(nll.mean),
        nll=nll.mean,
        nll_stderr=nll.stderr,
        kl_mean=None if kl is None else kl.mean,
        kl_stderr=None if kl is None else kl.stderr,
        top1_agreement=top1,
        seconds=seconds,
    )
