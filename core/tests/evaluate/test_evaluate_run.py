"""Whole evaluations against plain float64 loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.evaluate import (
    PROTOCOLS,
    ReferenceCache,
    ReferenceSpec,
    Storage,
    cached_reference,
    default_context,
    evaluate,
    evaluate_model,
    tokenize,
)
from quantmill.findings import QuantmillError

VOCAB = 13
TOKENS = (torch.arange(47, dtype=torch.int64) ** 2 * 7 + 3) % VOCAB
BOS = 12


def toy(scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A causal model whose logits depend on the running sum of ids, [B, T] -> [B, T, 13]."""

    def call(ids: Tensor) -> Tensor:
        state = ids.cumsum(1)[..., None] * 0.37 + torch.arange(VOCAB) * 1.1
        return torch.sin(state.float()) * 4 * scale

    return call


def plain(protocol: str, context: int, p: Any, q: Any) -> tuple[int, float, float, float]:
    """(count, mean nll, mean KL, agreement), token by token in float64."""
    n = len(TOKENS)
    jobs: list[tuple[list[int], int]] = []  # ids so far, target
    ids = TOKENS.tolist()
    if protocol == "sliding":
        begin = end_before = 0
        while end_before < n:
            end = min(begin + context, n)
            for t in range(max(end_before, 1), end):
                jobs.append((ids[begin:t], ids[t]))
            end_before, begin = end, begin + context // 2
    else:
        for start in range(0, n - context + 1, context):
            chunk = ids[start : start + context]
            lead = 1
            if protocol == "llama.cpp":
                chunk[0], lead = BOS, context // 2 + 1
            jobs += [(chunk[:t], chunk[t]) for t in range(lead, context)]
    nll = kl = agree = 0.0
    for history, target in jobs:
        log_p, log_q = (
            torch.log_softmax(m(torch.tensor([history]))[0, -1].double(), -1) for m in (p, q)
        )
        nll -= float(log_q[target])
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        agree += float(log_p.argmax() == log_q.argmax())
    return len(jobs), nll / len(jobs), kl / len(jobs), agree / len(jobs)


def reference_of(folder: Path, storage: Storage = "auto", **options: Any) -> Any:
    spec = ReferenceSpec.of("toy", TOKENS, storage=storage, **options)
    return cached_reference(spec, TOKENS, toy, cache=ReferenceCache(folder), batch_size=2)


@pytest.mark.parametrize("storage", ["float32", "cubic16"])
@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
@pytest.mark.parametrize(("context", "batch_size"), [(8, 1), (9, 3)])
def test_against_plain_loops(
    tmp_path: Path, storage: Storage, protocol: str, context: int, batch_size: int
) -> None:
    options: dict[str, Any] = {"protocol": protocol, "context": context, "bos_id": BOS}
    reference = reference_of(tmp_path, storage, **options)
    result = evaluate(toy(0.7), TOKENS, reference=reference, batch_size=batch_size, **options)
    count, nll, kl, agree = plain(protocol, context, toy(), toy(0.7))
    assert (result.protocol, result.context, result.tokens) == (protocol, context, count)
    assert (result.windows, count) == PROTOCOLS[protocol].count(len(TOKENS), context)
    assert result.nll == pytest.approx(nll, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.kl_mean == pytest.approx(kl, abs=1e-6 if storage == "float32" else 1e-5)
    assert result.top1_agreement == pytest.approx(agree)
    assert result.kl_stderr is not None and result.kl_stderr > 0
    low, high = result.perplexity_interval() or (0.0, 0.0)
    assert low < result.perplexity < high
    low, high = result.kl_interval() or (0.0, 0.0)
    assert low < kl < high


@pytest.mark.parametrize(("storage", "bound"), [("float32", 1e-12), ("cubic16", 1e-7)])
def test_a_model_has_no_divergence_from_itself(
    tmp_path: Path, storage: Storage, bound: float
) -> None:
    reference = reference_of(tmp_path, storage, context=8)
    result = evaluate(toy(), TOKENS, context=8, reference=reference)
    assert result.kl_mean is not None and abs(result.kl_mean) <= bound
    assert result.top1_agreement == 1.0


def test_without_reference() -> None:
    seen: list[tuple[int, int, str]] = []
    result = evaluate(
        toy(), TOKENS, context=8, max_windows=1, progress=lambda *item: seen.append(item)
    )
    assert (result.windows, result.tokens) == (1, 7)
    assert result.kl_mean is result.kl_stderr is result.top1_agreement is None
    assert result.nll_stderr is None and result.perplexity_interval() is None
    assert result.kl_interval() is None
    assert [item[:2] for item in seen] == [(0, 1), (1, 1)]
    assert json.loads(json.dumps(result.to_dict()))["perplexity"] == result.perplexity


def test_the_sequence_is_left_alone() -> None:
    tokens = TOKENS.clone()
    evaluate(toy(), tokens, protocol="llama.cpp", context=8, bos_id=BOS)
    assert torch.equal(tokens, TOKENS)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(QuantmillError) as caught:
        call()
    assert caught.value.findings[0].fix
    return caught.value.findings[0].code


def test_a_reference_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    reference = reference_of(tmp_path, context=8)

    def run(tokens: Tensor = TOKENS, **options: Any) -> Callable[[], object]:
        return lambda: evaluate(toy(), tokens, **{"context": 8, "reference": reference, **options})

    assert code_of(run(TOKENS.flip(0))) == "QM-EVAL-011"
    assert code_of(run(context=9)) == "QM-EVAL-011"
    assert code_of(run(protocol="sliding")) == "QM-EVAL-011"
    assert code_of(run(max_windows=2)) == "QM-EVAL-011"
    writer = ReferenceCache(tmp_path).writer(replace(reference.spec, context=9))
    assert code_of(run(reference=None, collect_reference=writer)) == "QM-EVAL-011"


def test_bad_input() -> None:
    assert code_of(lambda: evaluate(toy(), TOKENS[None], context=8)) == "QM-EVAL-030"
    assert code_of(lambda: evaluate(toy(), TOKENS.int(), context=8)) == "QM-EVAL-030"
    assert code_of(lambda: evaluate(toy(), TOKENS)) == "QM-EVAL-003"
    assert code_of(lambda: evaluate(lambda x: x, TOKENS, context=8)) == "QM-EVAL-031"
    last = lambda ids: toy()(ids)[:, -1:]  # noqa: E731
    assert code_of(lambda: evaluate(last, TOKENS, context=8)) == "QM-EVAL-031"
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(toy(), TOKENS, context=8, batch_size=0)


def test_non_finite_logits_name_the_window() -> None:
    tokens = TOKENS % BOS
    tokens[16] = BOS

    def broken(ids: Tensor) -> Tensor:
        logits = toy()(ids)
        logits[ids[:, 0] == BOS, 3] = math.nan
        return logits

    with pytest.raises(QuantmillError) as caught:
        evaluate(broken, tokens, context=8, batch_size=2)
    finding = caught.value.findings[0]
    assert (finding.code, finding.where) == ("QM-EVAL-020", "window 2")


class ToyModel(nn.Module):
    """Duck-typed causal model with dropout, so that the mode matters."""

    def __init__(self, positions: int | None = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True, max_position_embeddings=positions)
        self.embed = nn.Embedding(VOCAB, VOCAB)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        assert not use_cache and not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.drop(self.embed(input_ids)))


class ToyTokenizer:
    """One token per character; adds BOS (and EOS) if asked."""

    bos_token_id = BOS

    def __init__(self, add_bos: bool = True) -> None:
        self.add_bos = add_bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(letter) % 10 for letter in text]
        if add_special_tokens:
            ids = [BOS, *ids, 11] if self.add_bos else [*ids, 11]
        return {"input_ids": ids}


def test_tokenize() -> None:
    ids, bos = tokenize(ToyTokenizer(), "abc")
    assert (ids.tolist(), bos, ids.dtype) == ([BOS, 7, 8, 9], BOS, torch.int64)
    ids, bos = tokenize(ToyTokenizer(add_bos=False), "abc")
    assert (ids.tolist(), bos) == ([7, 8, 9], None)
    assert code_of(lambda: tokenize(lambda text, add_special_tokens: None, "a")) == "QM-EVAL-033"


def test_evaluate_model(tmp_path: Path) -> None:
    model, text = ToyModel(), "the quick brown fox jumps over the lazy dog" * 3
    model.drop.eval()  # an odd mixture that has to survive
    model.embed.train()
    tokens, bos = tokenize(ToyTokenizer(), text)
    spec = ReferenceSpec.of("m", tokens, protocol="llama.cpp", context=16, bos_id=bos)
    with ReferenceCache(tmp_path).writer(spec) as writer:
        first = evaluate_model(
            model, ToyTokenizer(), text, protocol="llama.cpp", collect_reference=writer
        )
    assert (first.context, first.windows) == (16, len(tokens) // 16)
    assert model.training and model.embed.training and not model.drop.training
    model.train()
    again = evaluate_model(
        model, ToyTokenizer(), text, protocol="llama.cpp", reference=writer.result, batch_size=4
    )
    assert again.kl_mean == pytest.approx(0, abs=1e-9)
    assert again.nll == pytest.approx(first.nll)
    assert model.drop.training


def test_context_of_a_model() -> None:
    assert default_context(ToyModel(16)) == 16
    assert default_context(ToyModel(4096)) == 512
    assert default_context(ToyModel(None)) == 512
    assert default_context(object()) == 512
    nested = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=64))
    assert default_context(SimpleNamespace(config=nested)) == 64
    text = "x" * 100
    run = evaluate_model
    assert code_of(lambda: run(ToyModel(), ToyTokenizer(), text, context=17)) == "QM-EVAL-032"
    assert code_of(lambda: run(ToyModel(), ToyTokenizer(), "abc")) == "QM-EVAL-003"
