"""Metadata of one architecture, read with checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.container import Array

if TYPE_CHECKING:
    from quantmill_gguf.container import GgufTensor

__all__ = ["Keys"]

_MOST: Final = {
    "block_count": 4096,
    "expert_count": 4096,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
}
"""Of what is counted one by one: beyond any model, and harmless where a file lies."""


class Keys:
    """The keys ``ARCHITECTURE.*`` of a file."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, file: str) -> None:
        self.metadata, self.prefix, self.file = metadata, prefix, file
        self.tables: dict[str, bytes] = {}
        """Little-endian float32 of the tensors that are tables and no parameters."""

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it is."""
        return self.metadata.get(f"{self.prefix}.{key}", default)

    def refuse(self, key: str, value: Any, wanted: str) -> QuantmillError:
        """The error for a value that is missing or wrong."""
        name = f"{self.prefix}.{key}"
        if value is None:
            return QuantmillError(
                codes.MISSING_KEY(
                    self.file, f"it lacks {name}", "convert the model with a current llama.cpp"
                )
            )
        return QuantmillError(
            codes.BAD_VALUE(self.file, f"{name} is {value!r:.60}, not {wanted}", "correct it")
        )

    def unsupported(self, cause: str) -> QuantmillError:
        """The error for what is not translated."""
        fix = "load the model's folder in place of the file"
        return QuantmillError(codes.UNSUPPORTED(self.file, cause, fix))

    def read(self, key: str, kind: str, default: Any = None) -> Any:
        """A value of the kind that :class:`~quantmill_gguf.architectures.family.Field` names."""
        if kind == "whole":
            return self.whole(key, default)
        if kind == "real":
            return self.real(key, default)
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive number; of a list with one value for every layer, that value."""
        value = self.get(key, default)
        if isinstance(value, Array) and value.kind not in (6, 7, 8, 12) and len(value) <= 1 << 16:
            values = set(value)
            value = values.pop() if len(values) == 1 else value
        most = _MOST.get(key, 2**31 - 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise self.refuse(key, value, f"a number from 1 to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or value <= 0
        ):
            raise self.refuse(key, value, "a positive number")
        # Stored as float32: the shortest decimal that is the same number there.
        return float(f"{value:.7g}")

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self.read(key, "flag", default))

    def wholes(self, key: str, count: int) -> list[int]:
        """One number, or a list with one for each of ``count`` layers; zeros are allowed."""
        value = self.get(key)
        if isinstance(value, Array) and value.kind not in (6, 7, 8, 12) and len(value) == count:
            found = [int(item) for item in value]
            if not all(0 <= item <= _MOST.get(key, 2**31 - 1) for item in found):
                raise self.refuse(key, found, "numbers that are not negative")
            return found
        return [self.whole(key)] * count

    def flags(self, key: str, count: int) -> list[bool] | None:
        """One truth value for each of ``count`` layers, or None."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, Array) and value.kind == 7 and len(value) == count:
            return [bool(item) for item in value]
        raise self.refuse(key, value, f"{count} truth values")

    def common(self, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
        """What every config has: vocabulary, special tokens, ties, dtype."""
        embedding = tensors.get("token_embd.weight")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None
        count = len(tokens) if isinstance(tokens, Array) else None
        vocabulary = rows or self.whole("vocab_size", count)
        found: dict[str, Any] = {
            "vocab_size": vocabulary,
            "tie_word_embeddings": "output.weight" not in tensors,
            "use_cache": True,
        }
        # llama.cpp computes in float32 around its matrix products. Of a file of floats that is
        # too much: what stays float32 there are norms and their like.
        stored = {item.type for item in tensors.values()}
        packed = any(not item.plain for item in stored)
        names = {item.name for item in stored}
        short = "BF16" if "BF16" in names else "F16" if "F16" in names else ""
        found["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(
            "" if packed else short, "float32"
        )
        for name in ("bos", "eos", "pad"):
            key = "padding" if name == "pad" else name
            token = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            good = isinstance(token, int) and 0 <= token < vocabulary
            # None where there is none: a class's default is another model's token.
            found[f"{name}_token_id"] = token if good else None
        return found
