"""A folder's tokenizer as metadata of a file: tokens, types, scores, merges, special ids, template.

``tokenizer.json`` is enough; ``tokenizer.model`` beside it gives the scores of its pieces. What
llama.cpp would cut otherwise is refused. Source: llama.cpp's converters (``conversion/base.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quantmill_gguf.vocab.kinds import from_json, from_pieces
from quantmill_gguf.vocab.model import (
    CONTROL,
    NO_SCORE,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Files,
    Vocabulary,
    VocabularyError,
)

__all__ = ["vocabulary_of"]

_ADDED_SCORE: Final = -1000.0
_GREEDY: Final = ("lstrip", "rstrip", "single_word")
"""Settings of added tokens that files have no place for."""
_SPECIAL: Final = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
}
"""Ids by the name that transformers has and the one that files have, misspelt as it is."""
_ENDS_OF_TURN: Final = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eot|>")


def vocabulary_of(
    files: Files, config: Mapping[str, Any], pre: str | None = None
) -> Vocabulary | None:
    """The tokenizer of a folder, or None when it has none.

    Args:
        files: the folder.
        config: of the model: the size of the vocabulary, and special ids that no file names.
        pre: the name of the pre-tokenizer, where the user says it.

    Raises:
        VocabularyError: it can't be written so that llama.cpp cuts texts in the same way.
    """
    data = files.json("tokenizer.json")
    if data is None:
        raw = files.read("tokenizer.model")
        if raw is None:
            return None
        settings = files.json("tokenizer_config.json") or {}
        found = from_pieces(raw, settings)
        added = settings.get("added_tokens_decoder") or {}
        _add(found, [{"id": int(number), **item} for number, item in added.items()])
    else:
        found = from_json(data, files, pre)
        _add(found, data.get("added_tokens") or [])
    _pad(found, int(config.get("vocab_size") or 0))
    _once(found)
    _specials(found, files, data or {}, config)
    _template(found, files)
    return found


def _add(found: Vocabulary, added: Sequence[Mapping[str, Any]]) -> None:
    """Tokens that are found in a text before it is cut."""
    greedy = [str(item["content"]) for item in added if any(item.get(key) for key in _GREEDY)]
    if greedy:
        cause = f"{greedy[0]!r:.60} takes spaces beside it with it, or stands for whole words only"
        found.notes.append(f"{cause}, as {len(greedy) - 1} more do" if greedy[1:] else cause)
    for item in added:
        index, text = int(item["id"]), str(item["content"])
        if not 0 <= index < 1 << 24:
            raise VocabularyError(f"a token has the id {index}", "correct tokenizer.json")
        while len(found.tokens) <= index:
            found.tokens.append(f"[PAD{len(found.tokens)}]")
            found.types.append(UNUSED)
            if found.scores is not None:
                found.scores.append(NO_SCORE)
        kind = CONTROL if item.get("special") else USER_DEFINED
        if found.types[index] == UNKNOWN:
            kind = UNKNOWN
        elif found.model == "llama" and kind == USER_DEFINED:
            text = text.replace(SPACE, " ")
        found.tokens[index], found.types[index] = text, kind
        if found.scores is not None and kind != UNKNOWN:
            found.scores[index] = _ADDED_SCORE


def _pad(found: Vocabulary, size: int) -> None:
    """As many tokens as the embedding has rows."""
    if size and len(found.tokens) > size:
        cause = f"it has {len(found.tokens)} tokens, and the model's vocabulary {size}"
        raise VocabularyError(cause, "take the tokenizer that belongs to the model")
    for index in range(len(found.tokens), size):
        found.tokens.append(f"[PAD{index}]")
        found.types.append(UNUSED)
        if found.scores is not None:
            found.scores.append(NO_SCORE)


def _once(found: Vocabulary) -> None:
    """llama.cpp ends the program over a text that two tokens have."""
    first: dict[str, int] = {}
    for index, text in enumerate(found.tokens):
        if first.setdefault(text, index) != index:
            cause = f"its tokens {first[text]} and {index} are both {text!r:.60}"
            raise VocabularyError(cause, "correct the tokenizer: llama.cpp takes a token once")


def _text_of(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _specials(
    found: Vocabulary, files: Files, data: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Ids of special tokens, and whether the first and last are added to every text."""
    settings = {
        **(files.json("special_tokens_map.json") or {}),
        **(files.json("tokenizer_config.json") or {}),
    }
    index = {text: number for number, text in reversed(list(enumerate(found.tokens)))}
    ids: dict[str, int] = {}
    for name, key in _SPECIAL.items():
        number = index.get(_text_of(settings.get(f"{name}_token")) or "")
        if number is None:
            value: Any = config.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < len(found.tokens):
                number = value
        if number is not None:
            ids[name] = found.more[f"tokenizer.ggml.{key}_token_id"] = number
    if "unk" not in ids and UNKNOWN in found.types:
        found.more["tokenizer.ggml.unknown_token_id"] = found.types.index(UNKNOWN)
    ends = [index[text] for text in _ENDS_OF_TURN if text in index]
    if ends and ends[0] != ids.get("eos"):
        found.more["tokenizer.ggml.eot_token_id"] = ends[0]
    if "post_processor" in data:
        before, after = _added_by(data.get("post_processor"))
        found.more["tokenizer.ggml.add_bos_token"] = bool(before)
        if before and before[0] in index:
            found.more["tokenizer.ggml.bos_token_id"] = index[before[0]]
        found.more["tokenizer.ggml.add_eos_token"] = bool(after)
        if after and after[0] in index:
            key = "seperator" if found.model == "bert" else "eos"
            found.more[f"tokenizer.ggml.{key}_token_id"] = index[after[0]]
        return
    for name in ("bos", "eos"):
        value = settings.get(f"add_{name}_token")
        if isinstance(value, bool):
            found.more[f"tokenizer.ggml.add_{name}_token"] = value


def _added_by(post: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """Special tokens that a post-processor puts before and after a text."""
    if post is None:
        return [], []
    kind = post.get("type")
    if kind == "Sequence":
        before: list[str] = []
        after: list[str] = []
        for item in post.get("processors") or ():
            first, last = _added_by(item)
            before, after = [*first, *before], [*after, *last]
        return before, after
    if kind == "TemplateProcessing":
        before, after, seen = [], [], False
        for item in post.get("single") or ():
            if "Sequence" in item:
                seen = True
            elif "SpecialToken" in item:
                (after if seen else before).append(str(item["SpecialToken"].get("id")))
        return before, after
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [str(post["cls"][0])], [str(post["sep"][0])]
    return [], []


def _template(found: Vocabulary, files: Files) -> None:
    """The chat template, and others by name."""
    settings = files.json("tokenizer_config.json") or {}
    value = settings.get("chat_template")
    raw = files.read("chat_template.jinja")
    if raw is not None:
        value = raw.decode("utf-8", "replace")
    elif value is None:
        value = (files.json("chat_template.json") or {}).get("chat_template")
    if isinstance(value, str):
        found.more["tokenizer.chat_template"] = value
    elif isinstance(value, list):
        names = []
        for item in value:
            name, text = str(item.get("name")), item.get("template")
            if not isinstance(text, str):
                continue
            if name == "default":
                found.more["tokenizer.chat_template"] = text
            else:
                names.append(name)
                found.more[f"tokenizer.chat_template.{name}"] = text
        if names:
            found.more["tokenizer.chat_templates"] = names
