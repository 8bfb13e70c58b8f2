"""Judging models by a text: perplexity, and the divergence from a reference that is run once."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.api import load, load_tokenizer, make_job, prepare
from quantmill.findings import Findings
from quantmill.host import Host, default_host
from quantmill.job import Job, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.evaluate import EvalResult, ModelFn, ReferenceLogits, Window

__all__ = ["Judge", "positions"]


def positions(config: Mapping[str, Any]) -> int | None:
    """Positions of a model, None where its config doesn't say."""
    for place in (config, config.get("text_config")):
        if isinstance(place, Mapping):
            value = place.get("max_position_embeddings") or place.get("n_positions")
            if isinstance(value, int) and value > 1:
                return value
    return None


class Judge:
    """A text, cut into windows, and what the reference model makes of it.

    The reference's distributions are cached on disk: two models are never in memory at once.
    """

    def __init__(
        self,
        reference: str | Path,
        text: str,
        *,
        device: str = "cpu",
        context: int | None = None,
        max_windows: int | None = None,
        protocol: str = "blocks",
        others: tuple[Mapping[str, Any], ...] = (),
        streaming: bool = False,
        host: Host | None = None,
    ) -> None:
        """``text`` is the text itself. ``others`` are configs of further models that must take
        the same windows. When ``streaming``, the reference is run block by block.

        Raises:
            QuantmillError: no tokenizer, or the text is too short.
        """
        from quantmill.evaluate import DEFAULT_CONTEXT, get_protocol, tokenize
        from quantmill.evaluate.models import check_context

        self.host = host or default_host()
        self.source, self.text, self.device = reference, text, device
        self.tokenizer = load_tokenizer(reference, host=self.host)
        self.headers = make_job(reference, host=self.host).headers
        limits = [positions(item) for item in (self.headers.config, *others)]
        known = [item for item in limits if item is not None]
        if context is not None:
            check_context(context, min(known, default=None))
        self.streaming = streaming
        self.shared: dict[str, Any] = {
            "protocol": protocol,
            "context": context or min([DEFAULT_CONTEXT, *known]),
            "max_windows": max_windows,
        }
        self.tokens, self.bos = tokenize(self.tokenizer, text)
        get_protocol(protocol).check(self.tokens.numel(), self.shared["context"], max_windows)
        self.findings = Findings()
        self._stored: ReferenceLogits | None = None

    def reference(self, progress: Progress | None = None) -> ReferenceLogits:
        """The reference's distributions, computed where the cache does not have them."""
        from quantmill.evaluate import ReferenceSpec, cached_reference, model_fn_of

        if self._stored is None:
            # Another device adds up in another order.
            identity = f"{self.headers.source.identity()}|{self.device.partition(':')[0]}"
            spec = ReferenceSpec.of(identity, self.tokens, bos_id=self.bos, **self.shared)

            def run() -> Any:
                if self.streaming:
                    job = make_job(
                        self.source, device=self.device, host=self.host, progress=progress
                    )
                    prepare(job, allow_float=True)
                    return self._stream(job)
                model: Any = load(
                    self.source, device=self.device, host=self.host, progress=progress
                )
                return model_fn_of(model.eval())

            self._stored = cached_reference(
                spec,
                self.tokens,
                run,
                findings=self.findings,
                progress=None if self.streaming else progress,
            )
            gc.collect()
        return self._stored

    def judge(self, model: Any, progress: Progress | None = None) -> EvalResult:
        """A loaded model against the reference."""
        from quantmill.evaluate import evaluate_model

        return evaluate_model(
            model,
            self.tokenizer,
            self.text,
            reference=self.reference(progress),
            progress=progress,
            **self.shared,
        )

    def judge_streaming(self, job: Job) -> EvalResult:
        """A prepared job's model against the reference, block by block."""
        from quantmill.evaluate import evaluate

        return evaluate(
            self._stream(job),
            self.tokens,
            bos_id=self.bos,
            reference=self.reference(job.progress),
            **self.shared,
        )

    def _stream(self, job: Job) -> ModelFn:
        from quantmill.streaming import streamed

        return streamed(job, self.batches())

    def windows(self) -> list[Window]:
        """Of the text, as the protocol cuts it."""
        from quantmill.evaluate import get_protocol

        rule = get_protocol(self.shared["protocol"])
        found = rule.windows(
            self.tokens.numel(), self.shared["context"], self.bos, self.shared["max_windows"]
        )
        return list(found)

    def batches(self) -> list[Tensor]:
        """Token ids of each window, int64 ``[1, length]``."""
        from quantmill.evaluate.run import token_batch

        return [token_batch(self.tokens, [window]) for window in self.windows()]

    def perplexity(self) -> float:
        """The reference's own, from its stored distributions."""
        stored = self.reference()
        total, count = 0.0, 0
        for window in self.windows():
            targets = self.tokens[window.targets]
            for start in range(0, targets.numel(), 64):
                part = targets[start : start + 64]
                log_p = stored.log_probs(window.index, start, start + part.numel())
                total -= float(log_p.gather(1, part[:, None]).double().sum())
            count += targets.numel()
        return math.exp(total / count)
