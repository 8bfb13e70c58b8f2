"""The vocabularies of llama.cpp's four kinds, from ``tokenizer.json`` or ``tokenizer.model``.

Byte-level BPE (``gpt2``), SentencePiece BPE (``llama``), unigram (``t5``) and WordPiece (``bert``).
What llama.cpp would cut otherwise is refused. Source: llama.cpp's converters
(``conversion/base.py``) and ``llama-vocab.cpp``.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantmill_gguf.vocab import sentencepiece
from quantmill_gguf.vocab.model import (
    BYTE,
    NO_SCORE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    Files,
    UnknownKind,
    Vocabulary,
    VocabularyError,
)
from quantmill_gguf.vocab.splits import NEAR, name_of, shown, steps_of

__all__ = ["from_json", "from_pieces"]


def from_json(data: Mapping[str, Any], files: Files, pre: str | None) -> Vocabulary:
    """Of ``tokenizer.json``, without its added tokens; ``pre`` names the pre-tokenizer where the
    user says it.

    Raises:
        VocabularyError: llama.cpp has no tokenizer that cuts texts in the same way.
    """
    model = data.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind == "BPE" and model.get("byte_fallback"):
        return _spm(data, files)
    if kind == "BPE":
        return _byte_level(data, pre)
    if kind == "Unigram":
        return _unigram(data)
    if kind == "WordPiece":
        return _word_piece(data)
    cause = f"tokenizer.json holds a model of the kind {kind!r:.40}"
    raise UnknownKind(cause, "llama.cpp reads BPE, Unigram and WordPiece")


def from_pieces(raw: bytes, settings: Mapping[str, Any]) -> Vocabulary:
    """Of ``tokenizer.model`` alone; ``settings`` are those of tokenizer_config.json.

    Raises:
        VocabularyError: it can't be read.
    """
    model = _pieces(raw)
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
    return found


def _pieces(raw: bytes) -> sentencepiece.PieceModel:
    try:
        return sentencepiece.parse(raw)
    except ValueError as error:
        cause = f"tokenizer.model can't be read: {error}"
        raise VocabularyError(cause, "get the tokenizer's files again") from None


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
        notes=[f"llama.cpp's {name} cuts {NEAR[name]} otherwise"] if name in NEAR else [],
    )


def _composes_only(normalizer: Mapping[str, Any]) -> bool:
    """NFC leaves nearly every text as it is: llama.cpp's converter overlooks it, and so do we."""
    if normalizer.get("type") == "Sequence":
        return all(_composes_only(item) for item in normalizer.get("normalizers") or ())
    return normalizer.get("type") == "NFC"


def _steps(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What changes and then cuts the text, in order; sequences opened."""
    stack = [data.get("normalizer"), data.get("pre_tokenizer")]
    while stack:
        item = stack.pop(0)
        if item is None:
            continue
        if item.get("type") == "Sequence":
            stack[:0] = item.get("normalizers") or item.get("pretokenizers") or []
        else:
            yield item


def _spaces(data: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like BPE puts a space before the text.

    Raises:
        VocabularyError: text is changed or cut in some other way.
    """
    prefix, escaped = False, False
    for item in _steps(data):
        kind = item.get("type")
        if kind == "Prepend" and item.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and item.get("content") == SPACE:
            escaped = True
        elif kind == "Metaspace" and item.get("replacement", SPACE) == SPACE:
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
    scores = [NO_SCORE] * len(tokens)
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
    for item in _steps(data):
        kind = item.get("type")
        if kind == "Precompiled":
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
    if squeeze and "tokenizer.ggml.precompiled_charsmap" not in found.more:
        found.notes.append(
            "llama.cpp takes spaces alone away, not line breaks at the end of a text"
        )
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
            tokens.append(SPACE + text)
    types = [NORMAL] * len(tokens)
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in vocabulary:
        types[vocabulary[unknown]] = UNKNOWN
    case = _bert_case(data)
    note = "llama.cpp loses parts of Korean syllables, as it takes accents away"
    return Vocabulary(
        "bert",
        tokens,
        types,
        more={"tokenizer.ggml.token_type_count": 2, **case},
        notes=[note] if case["tokenizer.ggml.normalizer.strip_accents"] else [],
    )


def _bert_case(data: Mapping[str, Any]) -> dict[str, bool]:
    """What BERT's normalizer does to letters: all of its ways that llama.cpp leaves open.

    Raises:
        VocabularyError: text is changed or cut in some other way.
    """
    normalizer, cut = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    usual = normalizer.get("type") == "BertNormalizer" and cut.get("type") == "BertPreTokenizer"
    whole = all(normalizer.get(key, True) for key in ("clean_text", "handle_chinese_chars"))
    if not (usual and whole):
        cause = f"its WordPiece changes text by {shown(normalizer)} and cuts it by {shown(cut)}"
        raise VocabularyError(cause, "llama.cpp knows BERT's way of it only")
    lower = bool(normalizer.get("lowercase", True))
    strip = normalizer.get("strip_accents")
    return {
        "tokenizer.ggml.normalizer.lowercase": lower,
        "tokenizer.ggml.normalizer.strip_accents": lower if strip is None else bool(strip),
    }
