"""Calibration data: text files, JSONL or token tensors become batches of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare
from quantmill.stages.calibrating import BATCH_TOKENS

__all__ = ["CalibrationData", "Calls", "read_calibration", "read_calls"]

NO_DATA = declare("QM-CALIB-001", "There is no calibration data, or it can't be read")
TOO_SHORT = declare("QM-CALIB-002", "The calibration data is too short")
BAD_TOKENS = declare("QM-CALIB-003", "Calibration tokens do not fit the model")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


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

    def batches(self, tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """Batches of about that many tokens: enough for products, and few for the caches."""
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
        data: a path (``.txt``; ``.jsonl`` with ``text``, ``messages`` or ``input_ids`` in each
            line, ``.json`` with a list of such items; ``.safetensors`` with ``input_ids``), a
            token tensor ``[n]`` or ``[windows, length]``, or a sequence of texts or such items.
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
    where = str(data) if isinstance(data, str | Path) else "calibration"
    if found.ndim not in (1, 2) or found.dtype not in _INTEGERS:
        raise QuantmillError(
            BAD_TOKENS(
                where,
                f"it is {found.dtype} {list(found.shape)}",
                "give token ids: integers, [n] or [windows, length]",
            )
        )
    rows = found if found.ndim == 2 else _windows(found, length)
    if rows.numel() == 0:
        if found.numel() == 0:
            raise QuantmillError(
                TOO_SHORT(where, "it holds no tokens", "give text that the tokenizer keeps")
            )
        raise QuantmillError(
            TOO_SHORT(
                where,
                f"it holds {found.numel()} tokens, and one window takes {length}",
                "give more text, or shorter windows (--calibration-length, length=)",
            )
        )
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise QuantmillError(
            BAD_TOKENS(
                where,
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
    if isinstance(data, Sequence) and data:
        return _joined(data, "calibration", "item", tokenizer)
    raise QuantmillError(
        NO_DATA(
            "calibration",
            "it is empty" if data == [] else f"a {type(data).__name__} is no calibration data",
            "give a path, a list of texts, or a tensor of token ids",
        )
    )


def _file(path: Path, tokenizer: Callable[[], Any]) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            return _stored(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if path.suffix == ".json":
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, str(error)) from None
        if not isinstance(items, list):
            raise _unreadable(path, "it is no list")
        return _joined(items, str(path), "item", tokenizer)
    if path.suffix != ".jsonl":
        return _joined([text], str(path), "text", tokenizer)
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _unreadable(path, f"line {number}: {error}") from None
    return _joined(lines, str(path), "line", tokenizer)


def _stored(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, str(error)) from None
    if "input_ids" not in found and len(found) != 1:
        raise _unreadable(path, f"it holds {len(found)} tensors, none of them named input_ids")
    return found["input_ids"] if "input_ids" in found else next(iter(found.values()))


def _unreadable(path: Path, cause: str) -> QuantmillError:
    return QuantmillError(
        NO_DATA(
            str(path),
            f"it can't be read: {cause[:200]}",
            "give UTF-8 text, JSON lines, or a .safetensors file with input_ids",
        )
    )


def _joined(items: Sequence[Any], where: str, what: str, tokenizer: Callable[[], Any]) -> Tensor:
    """Token ids of texts, conversations and rows of ids, one after the other."""
    ids: list[int] = []
    made: Any = None
    known = False
    for number, item in enumerate(items, 1):
        row = item.get("input_ids") if isinstance(item, Mapping) else item
        if isinstance(row, Tensor) and not row.is_floating_point():
            row = row.reshape(-1).tolist()
        if isinstance(row, list | tuple):
            if any(not isinstance(token, int) or isinstance(token, bool) for token in row):
                raise QuantmillError(
                    BAD_TOKENS(
                        where, f"{what} {number}: not all of it is token ids", "give whole numbers"
                    )
                )
            ids.extend(row)
            known = True
            continue
        made = made or tokenizer()
        words = _words(item, made, f"{where}: {what} {number}")
        if words is not None:
            ids.extend(made(words, add_special_tokens=False)["input_ids"])
            known = True
    if not known:
        raise QuantmillError(
            NO_DATA(
                where,
                f"no {what} has text, messages or input_ids",
                'write lines such as {"text": "..."}',
            )
        )
    return torch.tensor(ids, dtype=torch.int64)


def _words(item: Any, tokenizer: Any, where: str) -> str | None:
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        return None
    if isinstance(item.get("text"), str):
        return str(item["text"])
    if not isinstance(item.get("messages"), list):
        return None
    try:
        return str(tokenizer.apply_chat_template(item["messages"], tokenize=False))
    except Exception as error:  # a template is a program, and fails as programs do
        raise QuantmillError(
            NO_DATA(
                where,
                f"the tokenizer's chat template does not take its messages: {str(error)[:200]}",
                'give "text" in place of "messages"',
            )
        ) from error
