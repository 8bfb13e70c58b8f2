"""Named protocols: which windows of a token sequence a model reads and which predictions count.

Perplexities are comparable only under the same protocol and context length, so a result always
names both. Everything here is plain integer arithmetic without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from quantmill.findings import QuantmillError, declare

__all__ = ["DEFAULT_CONTEXT", "PROTOCOLS", "Protocol", "Window", "get_protocol"]

DEFAULT_CONTEXT: Final = 512
"""Context length in tokens used unless the caller or the model asks for less."""

UNKNOWN_PROTOCOL = declare("QM-EVAL-001", "Unknown evaluation protocol")
BAD_CONTEXT = declare("QM-EVAL-002", "Unusable context length or number of windows")
TOO_FEW_TOKENS = declare("QM-EVAL-003", "The text has fewer tokens than one window")


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass and the part of it that is scored.

    Attributes:
        index: position among the windows, from 0.
        input: slice of the token sequence that the model reads, with ``start`` and ``stop`` set.
        score: slice of positions *inside the window* whose logits are scored. The logits at
            position ``p`` predict the token at ``p + 1`` of the same window, therefore
            ``score.stop`` is at most ``length - 1``.
        bos_id: token that replaces the first one of the input, or None to leave it as it is.
    """

    index: int
    input: slice
    score: slice
    bos_id: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return int(self.input.stop - self.input.start)

    @property
    def scored(self) -> int:
        """Number of scored predictions."""
        return int(self.score.stop - self.score.start)

    @property
    def targets(self) -> slice:
        """Slice of the token sequence that holds the predicted tokens, in order of ``score``."""
        start = self.input.start + 1
        return slice(start + self.score.start, start + self.score.stop)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a token sequence is cut into windows and scored.

    Attributes:
        name: the name in results and on the command line.
        description: one sentence for people.
        source: where the protocol comes from, and how this one differs from it.
        stride_divisor: a window starts ``context // stride_divisor`` tokens after the one before.
            With 1 the windows do not overlap; otherwise only tokens that no earlier window has
            read are scored.
        second_half: score only the positions from ``context // 2`` on.
        keep_tail: whether a last window shorter than the context is evaluated.
        bos: whether the first token of every window is replaced by the beginning-of-sequence
            token, for tokenizers that add one.
        min_context: smallest context length with at least one scored prediction per window.
    """

    name: str
    description: str
    source: str
    stride_divisor: int = 1
    second_half: bool = False
    keep_tail: bool = False
    bos: bool = False
    min_context: int = 2

    def windows(
        self,
        n_tokens: int,
        context: int,
        bos_id: int | None = None,
        max_windows: int | None = None,
    ) -> Iterator[Window]:
        """The windows over a sequence, in order.

        Args:
            n_tokens: length of the whole sequence in tokens, including a leading BOS.
            context: window length in tokens.
            bos_id: the tokenizer's BOS id if the tokenizer adds one; ignored by protocols that
                leave the first token alone.
            max_windows: stop after this many windows; None means all.

        Raises:
            QuantmillError: ``QM-EVAL-002`` (context or max_windows too small), ``QM-EVAL-003``
                (fewer tokens than one window). Raised on the call, not on first iteration.
        """
        self.check(n_tokens, context, max_windows)
        return self._generate(n_tokens, context, bos_id if self.bos else None, max_windows)

    def check(self, n_tokens: int, context: int, max_windows: int | None = None) -> None:
        """Raise what :meth:`windows` would raise, without making windows."""
        if context < self.min_context:
            raise QuantmillError(
                BAD_CONTEXT(
                    f"context {context}",
                    f"protocol {self.name!r} scores nothing in windows of {context} token(s)",
                    f"use a context of at least {self.min_context}",
                    context=context,
                )
            )
        if max_windows is not None and max_windows < 1:
            raise QuantmillError(
                BAD_CONTEXT(
                    f"max_windows {max_windows}",
                    "at least one window has to be evaluated",
                    "give a positive number, or None for all windows",
                    max_windows=max_windows,
                )
            )
        if n_tokens < context:
            raise QuantmillError(
                TOO_FEW_TOKENS(
                    f"protocol {self.name!r}, context {context}",
                    f"the text has {n_tokens} token(s), one window needs {context}",
                    f"give a longer text or a context of at most {n_tokens}"
                    if n_tokens >= self.min_context
                    else "give a longer text",
                    n_tokens=n_tokens,
                    context=context,
                )
            )

    def _generate(
        self, n_tokens: int, context: int, bos_id: int | None, max_windows: int | None
    ) -> Iterator[Window]:
        stride = context // self.stride_divisor
        lead = context // 2 if self.second_half else 0
        start = read = index = 0
        while start < n_tokens and (max_windows is None or index < max_windows):
            stop = min(start + context, n_tokens)
            if stop - start < context and not self.keep_tail:
                return
            first = max(lead, read - start - 1)
            yield Window(index, slice(start, stop), slice(first, stop - start - 1), bos_id)
            if stop == n_tokens:
                return
            read, start, index = stop, start + stride, index + 1

    def count(self, n_tokens: int, context: int, max_windows: int | None = None) -> tuple[int, int]:
        """``(windows, scored predictions)`` of :meth:`windows`; raises the same errors."""
        windows = predictions = 0
        for window in self.windows(n_tokens, context, None, max_windows):
            windows += 1
            predictions += window.scored
        return windows, predictions


PROTOCOLS: Final[dict[str, Protocol]] = {
    item.name: item
    for item in (
        Protocol(
            name="blocks",
            description="Non-overlapping windows; every token after the first of each is scored.",
            source=(
                "The usual perplexity of quantization papers. n // context windows with "
                "context - 1 predictions each; a shorter tail is dropped."
            ),
        ),
        Protocol(
            name="sliding",
            description="Windows overlap by half; each token after the first is scored once.",
            source=(
                "The guide 'Perplexity of fixed-length models' of Hugging Face transformers with "
                "a stride of half the context; the shorter last window is kept. Tokens weigh "
                "equally here, whereas the guide's weights leave one prediction out per window."
            ),
            stride_divisor=2,
            keep_tail=True,
        ),
        Protocol(
            name="llama.cpp",
            description="Non-overlapping chunks that start with BOS; the second half is scored.",
            source=(
                "llama-perplexity without --ppl-stride: logits at context // 2 to context - 2 are "
                "scored, context - context // 2 - 1 predictions per chunk; a shorter tail is "
                "dropped. llama-perplexity insists on two chunks of text, here one is enough."
            ),
            second_half=True,
            bos=True,
            min_context=3,
        ),
    )
}
"""The protocols by name."""


def get_protocol(protocol: str | Protocol) -> Protocol:
    """The protocol of that name; a :class:`Protocol` is returned as it is.

    Raises:
        QuantmillError: ``QM-EVAL-001``, with the nearest name as the fix.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol in PROTOCOLS:
        return PROTOCOLS[protocol]
    from quantmill.config import suggestion

    names = ", ".join(repr(name) for name in PROTOCOLS)
    raise QuantmillError(
        UNKNOWN_PROTOCOL(
            f"protocol {protocol!r}",
            f"the protocols are {names}",
            suggestion(protocol, PROTOCOLS, cutoff=0.5, form="'{}'") or f"use one of {names}",
        )
    )
