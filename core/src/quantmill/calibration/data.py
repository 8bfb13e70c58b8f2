"""Calibration data: text files, JSONL or token tensors become batches of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare

__all__ = ["CalibrationData", "Calls", "read_calibration", "read_calls"]

NO_DATA = declare("QM-CALIB-001", "There is no calibration data, or it can't be read")
TOO_SHORT = declare("QM-CALIB-002", "The calibration data is too short")
BAD_TOKENS = declare("QM-CALIB-003", "Calibration tokens do not fit the model")


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Windows of tokens, all of one length."""

    tokens: Tensor
    """int64 ``[samples, length]``."""

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, by which a resumed job knows them."""
        data = self.tokens.contiguous().numpy().tobytes()
        return hashlib.sha256(data + str(tuple(self.tokens.shape)).encode()).hexdigest()

    def batches(self, tokens: int = 4096) -> list[Tensor]:
        """Batches of about that many tokens."""
        size = max(1, tokens // max(1, self.tokens.shape[1]))
        return list(torch.split(self.tokens, size))


@dataclass(frozen=True, slots=True)
class Calls:
    """Arguments for a plain module's forward, one per call."""

    arguments: tuple[Any, ...]

    @property
    def digest(self) -> str:
        """Not told from other calls: a live module is not resumed."""
        return ""

    def batches(self) -> list[Any]:
        """One per call."""
        return list(self.arguments)


def read_calls(data: Any) -> Calls:
    """Calls from a sequence of arguments, or from one tensor, split into batches of 8.

    Raises:
        QuantmillError: there is none.
    """
    found: tuple[Any, ...] = ()
    if isinstance(data, Tensor):
        found = tuple(torch.split(data, 8))
    elif isinstance(data, Sequence) and not isinstance(data, str):
        found = tuple(data)
    if not found:
        raise QuantmillError(
            NO_DATA(
                "calibration",
                "the method needs calibration data and none was given",
                "give a list of inputs for the module's forward",
            )
        )
    return Calls(found)


def read_calibration(
    data: Any,
    tokenizer: Callable[[], Any],
    *,
    samples: int,
    length: int,
    seed: int,
    vocabulary: int | None,
) -> CalibrationData:
    """Windows of ``length`` tokens from ``data``, at most ``samples`` of them, chosen by ``seed``.

    Args:
        data: a path (``.txt``; ``.jsonl`` with ``text``, ``messages`` or ``input_ids``;
            ``.safetensors`` with ``input_ids``), a token tensor ``[n]`` or ``[n, length]``, or a
            sequence of texts.
        tokenizer: gives the tokenizer; called for text only.
        samples: most windows.
        length: tokens per window; data in windows of its own keeps theirs.
        seed: of the choice among the windows there are.
        vocabulary: ids at or above it are refused; None where the model does not tell.

    Raises:
        QuantmillError: no data, unreadable, too short for one window, or ids out of range.
    """
    if data is None:
        raise QuantmillError(
            NO_DATA(
                "calibration",
                "the method needs calibration data and none was given",
                "give a text file: --calibration FILE",
            )
        )
    found = _read(data, tokenizer)
    rows = found if found.ndim == 2 else _windows(found, length)
    if rows.numel() == 0:
        raise QuantmillError(
            TOO_SHORT(
                "calibration",
                f"it holds {found.numel()} tokens, and one window takes {length}",
                "give more text, or a shorter window",
            )
        )
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise QuantmillError(
            BAD_TOKENS(
                "calibration",
                f"token ids run from {low} to {high}, the model has {vocabulary}",
                "tokenize with the model's own tokenizer",
            )
        )
    if rows.shape[0] > samples:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(rows.shape[0], generator=generator)[:samples].sort().values
        rows = rows[chosen]
    return CalibrationData(rows.to(torch.int64).contiguous())


def _windows(tokens: Tensor, length: int) -> Tensor:
    count = tokens.numel() // length
    return tokens[: count * length].reshape(count, length)


def _read(data: Any, tokenizer: Callable[[], Any]) -> Tensor:
    if isinstance(data, Tensor):
        return data
    if isinstance(data, str | Path):
        return _file(Path(data), tokenizer)
    if isinstance(data, Sequence) and data and all(isinstance(item, str) for item in data):
        return _tokens(tokenizer(), data)
    raise QuantmillError(
        NO_DATA(
            "calibration",
            f"a {type(data).__name__} is no calibration data",
            "give a path, a list of texts, or a tensor of token ids",
        )
    )


def _file(path: Path, tokenizer: Callable[[], Any]) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
            return found["input_ids"] if "input_ids" in found else next(iter(found.values()))
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return _tokens(tokenizer(), [text])
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, StopIteration) as error:
        raise QuantmillError(
            NO_DATA(str(path), f"it can't be read: {error}", "give UTF-8 text or JSON lines")
        ) from None
    ids = [item["input_ids"] for item in lines if isinstance(item, dict) and "input_ids" in item]
    if ids:
        return torch.tensor([token for row in ids for token in row], dtype=torch.int64)
    made = tokenizer()
    texts = [words for item in lines if (words := _words(item, made)) is not None]
    if not texts:
        raise QuantmillError(
            NO_DATA(
                str(path),
                "no line has text, messages or input_ids",
                'write lines such as {"text": "..."}',
            )
        )
    return _tokens(made, texts)


def _words(item: Any, tokenizer: Any) -> str | None:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        return None
    if isinstance(item.get("text"), str):
        return str(item["text"])
    if isinstance(item.get("messages"), list):
        return str(tokenizer.apply_chat_template(item["messages"], tokenize=False))
    return None


def _tokens(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)
