"""Pre-tokenizers: how text is cut before pairs are merged, and what llama.cpp calls that.

A file names a pre-tokenizer (``tokenizer.ggml.pre``), tokenizer.json spells it out. Here each name
has the steps that it stands for; what is written is found by comparing steps, so that a vocabulary
nobody has seen is known by how it cuts. Source: the table of ``llama-vocab.cpp`` and the
``tokenizer.json`` files it was made after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["GPT2", "NEAR", "PRE", "Pre", "Step", "name_of", "pre_named", "shown", "steps_of"]

_CONTRACTED: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the byte-level pre-tokenizer cuts by itself."""
_LLAMA3: Final = (
    rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
)
_QWEN2: Final = (
    rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
)
_QWEN35: Final = (
    rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN: Final = (
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_GPT4O: Final = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTED}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTED}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_DEEPSEEK3: Final = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)
_CJK3: Final = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_BLOOM: Final = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_SEED: Final = (
    rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}"
)

Step = tuple[str, ...]
"""``("split", regex)``, ``("digits", "each" or "runs")``, ``("punctuation",)``, ``("bytes",)``."""
_BYTES: Final[Step] = ("bytes",)


@dataclass(frozen=True, slots=True)
class Pre:
    """What a name stands for."""

    steps: tuple[Step, ...]
    whole: bool = False
    """A word that is a token is not merged (``ignore_merges``)."""


def _cut(*regexes: str, whole: bool = False) -> Pre:
    return Pre((*(("split", item) for item in regexes), _BYTES), whole)


_DIGITS: Final = Pre((("digits", "each"), ("split", GPT2), _BYTES))
PRE: Final[Mapping[str, Pre]] = {
    "gpt-2": _cut(GPT2),
    "smollm": _DIGITS,
    "llama-bpe": _cut(_LLAMA3, whole=True),
    "dbrx": _cut(_LLAMA3),
    "qwen2": _cut(_QWEN2),
    "qwen35": _cut(_QWEN35),
    "tekken": _cut(_TEKKEN, whole=True),
    "gpt-4o": _cut(_GPT4O),
    "deepseek-v3": _cut(r"\p{N}{1,3}", _CJK3, _DEEPSEEK3),
    "falcon": Pre(
        (
            ("punctuation",),
            ("split", GPT2),
            ("digits", "runs"),
            ("split", "[0-9][0-9][0-9]"),
            _BYTES,
        )
    ),
    "bloom": _cut(_BLOOM),
    "viking": Pre((("split", _BLOOM), ("digits", "each"), _BYTES)),
    "seed-coder": _cut(_SEED),
}
"""By the name that is written."""
_CASED: Final = "combining marks, and capitals beyond ASCII inside of words,"
NEAR: Final[Mapping[str, str]] = {
    "tekken": _CASED,
    "gpt-4o": _CASED,
    "falcon": "numbers like \u00bd and \u00b2",
}
"""Names whose regex llama.cpp has only nearly, and what it cuts otherwise."""
_SAME: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2", "gigachat"),
            *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "exaone4"),
            *("modern-bert", "roberta-bpe", "jina-v1-en", "jina-v2-code"),
        ),
        "gpt-2",
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        "smollm",
    ),
    **dict.fromkeys(
        (
            *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            *("jina-v5-nano", "glm4", "glm5"),
        ),
        "llama-bpe",
    ),
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe"), "dbrx"),
    **dict.fromkeys(
        (
            *("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open"),
            *("stablelm2", "grok-2"),
        ),
        "qwen2",
    ),
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), "gpt-4o"),
    **dict.fromkeys(("hunyuan-dense", "hy_v4", "joyai-llm"), "deepseek-v3"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
}


def pre_named(name: object) -> Pre | None:
    """What ``tokenizer.ggml.pre`` stands for, or None when it is not known here."""
    if not isinstance(name, str):
        return None
    return PRE.get(_SAME.get(name, name))


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Step, ...] | None:
    """The steps of tokenizer.json's ``pre_tokenizer``; None where one is of another kind."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = [steps_of(item) for item in pre_tokenizer.get("pretokenizers") or ()]
        if any(part is None for part in parts):
            return None
        return tuple(step for part in parts for step in part or ())
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            return None  # llama.cpp adds no space before a byte-level text.
        cut: tuple[Step, ...] = (("split", GPT2),) if pre_tokenizer.get("use_regex", True) else ()
        return (*cut, _BYTES)
    if kind == "Split":
        pattern = pre_tokenizer.get("pattern") or {}
        regex = pattern.get("Regex")
        isolated = str(pre_tokenizer.get("behavior", "")).lower() == "isolated"
        # Keeping what matches and removing the rest, the matches of these cover all text.
        inverted = pre_tokenizer.get("invert") and str(
            pre_tokenizer.get("behavior", "")
        ).lower() in ("removed", "isolated")
        if regex is None or not (isolated or inverted):
            return None
        return (("split", regex),)
    if kind == "Digits":
        return (("digits", "each" if pre_tokenizer.get("individual_digits") else "runs"),)
    if kind == "Punctuation":
        return (("punctuation",),)
    return None


def name_of(steps: Sequence[Step], whole: bool) -> str | None:
    """The name under which llama.cpp cuts text so, or None when there is none.

    ``whole`` says whether words that are tokens are left whole; without a name of just that kind
    one that differs in it alone is not taken.
    """
    wanted = tuple(_normal(step) for step in steps)
    for name, pre in PRE.items():
        if pre.whole == whole and tuple(_normal(step) for step in pre.steps) == wanted:
            return name
    return None


def _normal(step: Step) -> Step:
    """One spelling of a regex: groups that capture nothing of interest, escapes of plain signs."""
    if step[0] != "split":
        return step
    regex = step[1]
    for old, new in (("{1,1}", ""), ("\\p{N}{1}", "\\p{N}"), ("\n", "\\n"), ("\r", "\\r")):
        regex = regex.replace(old, new)
    return ("split", regex)


def shown(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """A pre-tokenizer in a message."""
    return json.dumps(pre_tokenizer, ensure_ascii=False)[:400]
