"""Evaluating a model and a tokenizer as they come, by duck typing: nothing here imports one.

A model is something called as ``model(input_ids=int64 [B, T])`` that returns logits [B, T, V],
as an attribute ``logits`` or as they are. A tokenizer is something called as
``tokenizer(text, add_special_tokens=bool)`` that returns ``input_ids``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantmill.evaluate.protocols import DEFAULT_CONTEXT, Protocol
from quantmill.evaluate.reference import ReferenceLogits
from quantmill.evaluate.run import EvalResult, ModelFn, Progress, evaluate
from quantmill.evaluate.writer import ReferenceWriter
from quantmill.findings import QuantmillError, declare

__all__ = [
    "check_context",
    "default_context",
    "evaluate_model",
    "max_positions",
    "model_fn_of",
    "tokenize",
]

TOO_LONG = declare("QM-EVAL-032", "The context is longer than the model's positions")
BAD_TOKENIZER = declare("QM-EVAL-033", "The tokenizer gives no usable ids")


def tokenize(tokenizer: Any, text: str) -> tuple[Tensor, int | None]:
    """Ids of a text, and the BOS id if this tokenizer puts one in front.

    A BOS the tokenizer adds is kept at the start; an EOS or other closing tokens are not added,
    as none of the protocols knows them.

    Returns:
        int64 [n] on the CPU, and the BOS id or None.

    Raises:
        QuantmillError: ``QM-EVAL-033``, the tokenizer returns something else than a list of ids.
    """
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and _ids(tokenizer, "a", True)[:1] != [bos]:
        bos = None
    ids = _ids(tokenizer, text, False)
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return torch.tensor(ids, dtype=torch.int64), bos


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    output = tokenizer(text, add_special_tokens=special)
    try:
        ids = output["input_ids"]
        return [int(item) for item in ids]
    except (KeyError, TypeError, ValueError) as error:
        raise QuantmillError(
            BAD_TOKENIZER(
                type(tokenizer).__name__,
                f"its output has no flat list 'input_ids' ({type(output).__name__})",
                "pass a tokenizer of transformers, or tokenize the text and use evaluate()",
            )
        ) from error


def max_positions(model: Any) -> int | None:
    """``max_position_embeddings`` of the model's config (or its text config), None if unknown."""
    config = getattr(model, "config", None)
    for place in (config, getattr(config, "text_config", None)):
        value = getattr(place, "max_position_embeddings", None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_context(length: int, limit: int | None) -> None:
    """Refuse a context of ``length`` tokens beyond the ``limit`` of a model's positions.

    Raises:
        QuantmillError: ``QM-EVAL-032``.
    """
    if limit is not None and length > limit:
        raise QuantmillError(
            TOO_LONG(
                f"context {length}",
                f"the model has {limit} positions",
                f"use a context of at most {limit}",
                context=length,
                positions=limit,
            )
        )


def default_context(model: Any) -> int:
    """The smaller of :data:`DEFAULT_CONTEXT` and the model's positions, in tokens."""
    return min(max_positions(model) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def model_fn_of(model: Any) -> ModelFn:
    """The model as a function of ids; ids are moved to the device of its first parameter.

    Keys and values are not cached where the config has ``use_cache``.
    """
    options: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "use_cache"):
        options["use_cache"] = False
    device = _device(model)

    def call(ids: Tensor) -> Tensor:
        output = model(input_ids=ids if device is None else ids.to(device), **options)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    return call


def _device(model: Any) -> torch.device | None:
    for name in ("parameters", "buffers"):
        for tensor in getattr(model, name, tuple)():
            if tensor.device.type != "meta":  # offloaded weights tell nothing
                device: torch.device = tensor.device
                return device
    return None


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Every submodule in evaluation mode inside, as before outside."""
    modules = list(getattr(model, "modules", tuple)())
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluate_model(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    protocol: str | Protocol = "blocks",
    context: int | None = None,
    max_windows: int | None = None,
    reference: ReferenceLogits | None = None,
    collect_reference: ReferenceWriter | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> EvalResult:
    """:func:`quantmill.evaluate.evaluate` for a model, its tokenizer and a text.

    Args:
        model: a causal language model; runs in evaluation mode, its modes are restored.
        tokenizer: the model's tokenizer.
        text: the whole text, for example a test set joined as its protocol prescribes.
        context: window length in tokens, :func:`default_context` of the model by default.

    The other arguments and the errors are those of ``evaluate``. To collect a reference, make
    its specification from :func:`tokenize`.

    Raises:
        QuantmillError: also ``QM-EVAL-032`` (context beyond the model's positions) and
            ``QM-EVAL-033`` (output of the tokenizer).
    """
    length = default_context(model) if context is None else context
    check_context(length, max_positions(model))
    tokens, bos_id = tokenize(tokenizer, text)
    with _evaluating(model):
        return evaluate(
            model_fn_of(model),
            tokens,
            protocol=protocol,
            context=length,
            max_windows=max_windows,
            bos_id=bos_id,
            reference=reference,
            collect_reference=collect_reference,
            batch_size=batch_size,
            progress=progress,
        )
