"""A folder's tokenizer as metadata of a file: tokens, types, scores, merges, special ids, template.

``tokenizer.json`` is enough; ``tokenizer.model`` beside it gives the scores of its pieces. What
llama.cpp would cut otherwise is refused. Source: llama.cpp's converters (``conversion/base.py``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from quantmill_gguf.vocab import sentencepiece
from quantmill_gguf.vocab.splits import name_of, shown, steps_of

__all__ = ["Files", "Vocabulary", "VocabularyError", "vocabulary_of"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
_SPACE: Final = "\u2581"
_NO_SCORE: Final = -10000.0
_ADDED_SCORE: Final = -1000.0
_SPECIAL: Final = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
}
"""Ids by the name that transformers has and the one that files have, misspelt as it is."""
_ENDS_OF_TURN: Final = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eot|>")


class VocabularyError(Exception):
    """A tokenizer that can't be written; ``fix`` says what to do."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.cause, self.fix = cause, fix


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
        found = _from_pieces(_pieces(raw), files.json("tokenizer_config.json") or {})
    else:
        found = _from_json(data, files, pre)
    _pad(found, int(config.get("vocab_size") or 0))
    _specials(found, files, data or {}, config)
    _template(found, files)
    return found


def _pieces(raw: bytes) -> sentencepiece.PieceModel:
    try:
        return sentencepiece.parse(raw)
    except ValueError as error:
        cause = f"tokenizer.model can't be read: {error}"
        raise VocabularyError(cause, "get the tokenizer's files again") from None


def _from_pieces(model: sentencepiece.PieceModel, settings: Mapping[str, Any]) -> Vocabulary:
    """Of ``tokenizer.model`` alone."""
    tokens = [text for text, _, _ in model.pieces]
    found = Vocabulary(
        "llama" if model.kind == 2 else "t5",
        tokens,
        [kind for _, _, kind in model.pieces],
        [score for _, score, _ in model.pieces],
    )
    if model.kind == 2:
        found.more["tokenizer.ggml.pre"] = "default"
    else:
        found.more["tokenizer.ggml.remove_extra_whitespaces"] = model.squeeze
        if model.charsmap:
            found.more["tokenizer.ggml.precompiled_charsmap"] = list(model.charsmap)
    prefix = settings.get("add_prefix_space")
    found.more["tokenizer.ggml.add_space_prefix"] = bool(
        model.space_prefix if prefix is None else prefix
    )
    added = settings.get("added_tokens_decoder") or {}
    _add(found, [{"id": int(number), **item} for number, item in added.items()])
    return found


def _from_json(data: Mapping[str, Any], files: Files, pre: str | None) -> Vocabulary:
    model = data.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind == "BPE" and model.get("byte_fallback"):
        found = _spm(data, files)
    elif kind == "BPE":
        found = _byte_level(data, pre)
    elif kind == "Unigram":
        found = _unigram(data)
    elif kind == "WordPiece":
        found = _word_piece(data)
    else:
        cause = f"tokenizer.json holds a model of the kind {kind!r:.40}"
        raise VocabularyError(cause, "llama.cpp reads BPE, Unigram and WordPiece")
    _add(found, data.get("added_tokens") or [])
    return found


def _by_id(vocabulary: Mapping[str, int]) -> list[str]:
    """Tokens by id; ids that nothing has are named like llama.cpp's padding."""
    size = 1 + max(vocabulary.values(), default=-1)
    if size > 1 << 24:
        raise VocabularyError(f"a token has the id {size - 1}", "correct tokenizer.json")
    tokens = [f"[PAD{index}]" for index in range(size)]
    for text, index in vocabulary.items():
        tokens[index] = text
    return tokens


def _types(tokens: Sequence[str], vocabulary: Mapping[str, int]) -> list[int]:
    return [NORMAL if text in vocabulary else UNUSED for text in tokens]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for item in model.get("merges") or ():
        pair = item.split(" ", 1) if isinstance(item, str) else item
        if len(pair) != 2:
            raise VocabularyError(f"the merge {item!r:.60} is no pair", "correct tokenizer.json")
        found.append((pair[0], pair[1]))
    return found


def _byte_level(data: Mapping[str, Any], pre: str | None) -> Vocabulary:
    """Byte-level BPE."""
    model = data["model"]
    steps = steps_of(data.get("pre_tokenizer"))
    name = pre
    if pre is None:
        name = None if steps is None else name_of(steps, bool(model.get("ignore_merges")))
    if name is None:
        raise VocabularyError(
            f"llama.cpp has no pre-tokenizer that cuts like {shown(data.get('pre_tokenizer'))}",
            "if you know its name there, give it: gguf-METHOD:pre_tokenizer=NAME",
        )
    normalizer = data.get("normalizer")
    if normalizer is not None and not _composes_only(normalizer):
        cause = f"its text is changed before it is cut, by {shown(normalizer)}"
        raise VocabularyError(cause, "llama.cpp does not change text before byte-level BPE")
    tokens = _by_id(model["vocab"])
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return Vocabulary(
        "gpt2",
        tokens,
        _types(tokens, model["vocab"]),
        merges=merges,
        more={"tokenizer.ggml.pre": name},
    )


def _composes_only(normalizer: Mapping[str, Any]) -> bool:
    """NFC leaves nearly every text as it is: llama.cpp's converter overlooks it, and so do we."""
    if normalizer.get("type") == "Sequence":
        return all(_composes_only(item) for item in normalizer.get("normalizers") or ())
    return normalizer.get("type") == "NFC"


def _spaces(data: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like BPE puts a space before the text.

    Raises:
        VocabularyError: text is changed or cut in some other way.
    """
    prefix, escaped = False, False
    stack = [data.get("normalizer"), data.get("pre_tokenizer")]
    while stack:
        item = stack.pop(0)
        if item is None:
            continue
        kind = item.get("type")
        if kind == "Sequence":
            stack[:0] = item.get("normalizers") or item.get("pretokenizers") or []
        elif kind == "Prepend" and item.get("prepend") == _SPACE:
            prefix = True
        elif kind == "Replace" and item.get("content") == _SPACE:
            escaped = True
        elif kind == "Metaspace" and item.get("replacement", _SPACE) == _SPACE:
            escaped = True
            old = "always" if item.get("add_prefix_space", True) else "never"
            prefix = prefix or item.get("prepend_scheme", old) != "never"
            if item.get("split"):
                raise _changed(item)
        elif kind == "Split" and (item.get("pattern") or {}).get("String") == " ":
            pass  # After the replacement no space is left.
        else:
            raise _changed(item)
    if not escaped:
        raise _changed(data.get("normalizer"))
    return prefix


def _changed(item: Any) -> VocabularyError:
    cause = f"its BPE with bytes for what is unknown changes or cuts text by {shown(item)}"
    return VocabularyError(cause, "llama.cpp replaces spaces and puts one before the text, no more")


def _spm(data: Mapping[str, Any], files: Files) -> Vocabulary:
    """SentencePiece BPE: llama.cpp merges the pair whose token has the best score.

    Without ``tokenizer.model`` scores come from the merges: a token's is the number of the first
    merge that makes it, negative, which orders pairs as the merges do.
    """
    model = data["model"]
    vocabulary: dict[str, int] = model["vocab"]
    tokens = _by_id(vocabulary)
    types = _types(tokens, vocabulary)
    scores = [_NO_SCORE] * len(tokens)
    merges = _merges(model)
    for rank, (left, right) in enumerate(merges):
        index = vocabulary.get(left + right)
        if index is None:
            cause = f"the merge of {left!r:.30} and {right!r:.30} makes no token"
            raise VocabularyError(cause, "correct tokenizer.json")
        scores[index] = max(scores[index], -float(rank))
    made = {left + right for left, right in merges}
    for text, index in vocabulary.items():
        if _is_byte(text):
            types[index], scores[index] = BYTE, 0.0
        elif text not in made and len(text) == 1:
            # Nothing makes it, so its score is never looked at; below all that are.
            scores[index] = -float(len(merges) + 1)
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in vocabulary:
        types[vocabulary[unknown]], scores[vocabulary[unknown]] = UNKNOWN, 0.0
    raw = files.read("tokenizer.model")
    if raw is not None:
        pieces = _pieces(raw).pieces
        for index, (text, score, kind) in enumerate(pieces[: len(tokens)]):
            if tokens[index] == text:
                scores[index], types[index] = score, kind
    prefix = _spaces(data)
    return Vocabulary(
        "llama",
        tokens,
        types,
        scores,
        more={"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix},
    )


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _unigram(data: Mapping[str, Any]) -> Vocabulary:
    """Unigram, as T5 has it."""
    model = data["model"]
    pieces = model.get("vocab") or []
    tokens = [str(piece[0]) for piece in pieces]
    types = [BYTE if _is_byte(text) else NORMAL for text in tokens]
    unknown = model.get("unk_id")
    if isinstance(unknown, int) and 0 <= unknown < len(types):
        types[unknown] = UNKNOWN
    found = Vocabulary(
        "t5",
        tokens,
        types,
        [float(piece[1]) for piece in pieces],
        more={"tokenizer.ggml.pre": "default"},
    )
    squeeze = prefix = False
    stack = [data.get("normalizer"), data.get("pre_tokenizer")]
    while stack:
        item = stack.pop(0)
        if item is None:
            continue
        kind = item.get("type")
        if kind == "Sequence":
            stack[:0] = item.get("normalizers") or item.get("pretokenizers") or []
        elif kind == "Precompiled":
            blob = base64.b64decode(item.get("precompiled_charsmap") or "")
            found.more["tokenizer.ggml.precompiled_charsmap"] = list(blob)
        elif kind == "Metaspace":
            old = "always" if item.get("add_prefix_space", True) else "never"
            prefix = item.get("prepend_scheme", old) != "never"
        elif (
            kind == "Replace" and (item.get("pattern") or {}).get("Regex") == " {2,}"
        ) or kind in ("Strip", "WhitespaceSplit"):
            squeeze = True
        else:
            cause = f"its unigram model changes or cuts text by {shown(item)}"
            raise VocabularyError(cause, "llama.cpp knows T5's way of it only")
    found.more["tokenizer.ggml.add_space_prefix"] = prefix
    found.more["tokenizer.ggml.remove_extra_whitespaces"] = squeeze
    return found


def _word_piece(data: Mapping[str, Any]) -> Vocabulary:
    """WordPiece: a word's first piece is marked in files, in tokenizer.json its others are."""
    model = data["model"]
    vocabulary: dict[str, int] = model["vocab"]
    mark = model.get("continuing_subword_prefix") or "##"
    added = {item["content"] for item in data.get("added_tokens") or ()}
    tokens = []
    for text in _by_id(vocabulary):
        if text in added or (text.startswith("[") and text.endswith("]")):
            tokens.append(text)
        elif text.startswith(mark):
            tokens.append(text[len(mark) :])
        else:
            tokens.append(_SPACE + text)
    types = [NORMAL] * len(tokens)
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in vocabulary:
        types[vocabulary[unknown]] = UNKNOWN
    return Vocabulary("bert", tokens, types, more={"tokenizer.ggml.token_type_count": 2})


def _add(found: Vocabulary, added: Sequence[Mapping[str, Any]]) -> None:
    """Tokens that are found in a text before it is cut."""
    for item in added:
        index, text = int(item["id"]), str(item["content"])
        if not 0 <= index < 1 << 24:
            raise VocabularyError(f"a token has the id {index}", "correct tokenizer.json")
        while len(found.tokens) <= index:
            found.tokens.append(f"[PAD{len(found.tokens)}]")
            found.types.append(UNUSED)
            if found.scores is not None:
                found.scores.append(_NO_SCORE)
        kind = CONTROL if item.get("special") else USER_DEFINED
        if found.types[index] == UNKNOWN:
            kind = UNKNOWN
        elif found.model == "llama" and kind == USER_DEFINED:
            text = text.replace(_SPACE, " ")
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
            found.scores.append(_NO_SCORE)


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
