"""A vocabulary as files have it, and what a folder has it in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = [
    *("BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED"),
    *("NO_SCORE", "SPACE", "Files", "UnknownKind", "Vocabulary", "VocabularyError"),
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
SPACE: Final = "\u2581"
"""What SentencePiece writes for a space."""
NO_SCORE: Final = -10000.0
"""Of a token that no text is cut into."""


class VocabularyError(Exception):
    """A tokenizer that can't be written; ``fix`` says what to do."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.cause, self.fix = cause, fix


class UnknownKind(VocabularyError):
    """A tokenizer of a kind that llama.cpp does not have: nothing would make it one of its own."""


@dataclass(slots=True)
class Files:
    """A folder's files, as far as they are there."""

    read: Callable[[str], bytes | None]

    def json(self, name: str) -> Any:
        """A parsed file; None where there is none.

        Raises:
            VocabularyError: it is no JSON.
        """
        data = self.read(name)
        if data is None:
            return None
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            fix = "get the tokenizer's files again"
            raise VocabularyError(f"{name} is no JSON: {str(error)[:100]}", fix) from None


@dataclass(slots=True)
class Vocabulary:
    """What goes into a file."""

    model: str
    """``tokenizer.ggml.model``."""
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """Other keys, in full."""
    notes: list[str] = field(default_factory=list)
    """Where llama.cpp cuts some texts in another way all the same."""

    def metadata(self) -> dict[str, Any]:
        """Keys and values."""
        found: dict[str, Any] = {"tokenizer.ggml.model": self.model}
        if "tokenizer.ggml.pre" in self.more:
            found["tokenizer.ggml.pre"] = self.more["tokenizer.ggml.pre"]
        found["tokenizer.ggml.tokens"] = self.tokens
        if self.scores is not None:
            found["tokenizer.ggml.scores"] = self.scores
        found["tokenizer.ggml.token_type"] = self.types
        if self.merges is not None:
            found["tokenizer.ggml.merges"] = self.merges
        return found | self.more

    @property
    def kinds(self) -> dict[str, str | int]:
        """Value types of the keys where the values don't tell."""
        return {
            "tokenizer.ggml.tokens": "string",
            "tokenizer.ggml.merges": "string",
            "tokenizer.ggml.scores": "float32",
            "tokenizer.ggml.token_type": "int32",
            "tokenizer.ggml.precompiled_charsmap": "uint8",
            **dict.fromkeys((key for key in self.more if key.endswith("_token_id")), "uint32"),
        }
