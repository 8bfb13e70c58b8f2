"""A file's tokenizer as a tokenizer of the ``tokenizers`` library.

llama.cpp's four kinds: byte-level BPE (``gpt2``), SentencePiece BPE (``llama``), unigram (``t5``)
and WordPiece (``bert``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from quantmill.findings import QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.container import Array
from quantmill_gguf.vocab.model import BYTE, CONTROL, SPACE, UNUSED, USER_DEFINED
from quantmill_gguf.vocab.splits import Pre, pre_named

__all__ = ["merges_of", "pre_tokenizers_of", "tokenizer_of"]

_PIECE: Final = re.compile(r"[^$:][^:]*", re.DOTALL)
_LONGEST: Final = 1024
"""Characters of a token that is taken apart at every place."""


def tokenizer_of(metadata: Mapping[str, Any], file: str) -> Any:
    """The ``tokenizers.Tokenizer`` that the metadata describe; None where there is no vocabulary.

    Raises:
        QuantmillError: it is of a kind that is not known, or its parts contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    if kind is None or tokens is None:
        return None
    types = _for_each(metadata, "tokenizer.ggml.token_type", len(tokens), file) or [1] * len(tokens)
    if kind == "gpt2":
        made = _byte_level(metadata, tokens, types, file)
    elif kind == "llama":
        made = _spm(metadata, tokens, types, file)
    elif kind == "t5":
        made = _unigram(metadata, tokens, types, file)
    elif kind == "bert":
        made = _word_piece(metadata, tokens)
    else:
        raise QuantmillError(
            codes.UNSUPPORTED(
                file,
                f"its tokenizer is of the kind {kind!r:.40}; known are bert, gpt2, llama and t5",
                "take the tokenizer of the model's folder",
            )
        )
    _add_tokens(made, kind, tokens, types)
    _add_ends(made, metadata, kind, tokens)
    return made


def _refuse(file: str, cause: str) -> QuantmillError:
    return QuantmillError(codes.BAD_TOKENIZER(file, cause, "convert the model again"))


def _texts(metadata: Mapping[str, Any], key: str) -> list[str] | None:
    value = metadata.get(key)
    good = isinstance(value, Array) and value.kind == 8
    return list(value) if good and value is not None else None


def _for_each(
    metadata: Mapping[str, Any], key: str, count: int, file: str, needed: bool = False
) -> list[Any] | None:
    """One finite number for each of ``count`` tokens."""
    value = metadata.get(key)
    if not isinstance(value, Array) or value.kind == 8:
        if needed or value is not None:
            raise _refuse(file, f"{key} is no array of numbers")
        return None
    if len(value) != count:
        raise _refuse(file, f"it has {count} tokens, and {len(value)} values in {key}")
    found = list(value)
    if not all(math.isfinite(item) for item in found):
        raise _refuse(file, f"{key} holds NaN or infinity")
    return found


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], file: str
) -> Any:
    from tokenizers import Tokenizer, decoders, models

    merges = _texts(metadata, "tokenizer.ggml.merges")
    if merges is None:
        raise _refuse(file, "its byte-level BPE has no merges")
    name = metadata.get("tokenizer.ggml.pre")
    pre = pre_named(name)
    if pre is None:
        raise QuantmillError(
            codes.UNSUPPORTED(
                file,
                f"its pre-tokenizer is {name!r:.40}, which is not known here",
                "take the tokenizer of the model's folder",
            )
        )
    vocabulary = {text: index for index, text in enumerate(tokens)}
    pairs = []
    for item in merges:
        left, space, right = item.partition(" ") if not item.startswith(" ") else ("", "", "")
        if not space or left not in vocabulary or right not in vocabulary:
            raise _refuse(file, f"the merge {item!r:.60} is no pair of tokens")
        pairs.append((left, right))
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.whole)
    except Exception as error:
        raise _refuse(file, f"its merges don't fit its tokens: {error}") from error
    made = Tokenizer(model)
    made.pre_tokenizer = _pre_tokenizer(pre)
    made.decoder = decoders.ByteLevel()
    return made


def _pre_tokenizer(pre: Pre) -> Any:
    from tokenizers import pre_tokenizers

    parts = pre_tokenizers_of(pre)
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def pre_tokenizers_of(pre: Pre) -> list[Any]:
    """Pre-tokenizers of ``tokenizers`` that cut one after the other as llama.cpp's does."""
    from tokenizers import Regex, pre_tokenizers

    parts: list[Any] = []
    for step in pre.steps:
        if step[0] == "split":
            parts.append(pre_tokenizers.Split(Regex(step[1]), behavior="isolated"))
        elif step[0] == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=step[1] == "each"))
        elif step[0] == "punctuation":
            parts.append(pre_tokenizers.Punctuation(behavior="contiguous"))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return parts


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: every way to make a token of two others,
    the best score first."""
    index = {text: number for number, text in enumerate(tokens)}
    found = []
    for number, text in enumerate(tokens):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in index and right in index:
                found.append((-scores[number], index[left], index[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _spm(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int], file: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _for_each(metadata, "tokenizer.ggml.scores", len(tokens), file, needed=True)
    assert scores is not None
    if max(map(len, tokens), default=0) > _LONGEST:
        raise _refuse(file, f"one of its tokens has more than {_LONGEST} characters")
    # Tokens that are found in a text before it is cut are made of no others.
    apart = (CONTROL, UNUSED, USER_DEFINED, BYTE)
    pieces = [text if types[i] not in apart else "" for i, text in enumerate(tokens)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    good = isinstance(unknown, int) and 0 <= unknown < len(tokens)
    made = Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate(tokens)},
            merges=[pair for pair in merges_of(pieces, scores) if all(pair)],
            unk_token=tokens[unknown] if good else None,
            fuse_unk=True,
            byte_fallback=any(kind == BYTE for kind in types),
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(undo)
    return made


def _unigram(
    metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int], file: str
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = _for_each(metadata, "tokenizer.ggml.scores", len(tokens), file, needed=True)
    assert scores is not None
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    made = Tokenizer(
        models.Unigram(
            [(text, float(score)) for text, score in zip(tokens, scores, strict=True)],
            unk_id=unknown if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
            byte_fallback=any(kind == BYTE for kind in types),
        )
    )
    steps: list[Any] = []
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if isinstance(charsmap, Array) and charsmap.kind in (0, 1) and len(charsmap):
        raw = bytes(charsmap.data[charsmap.start : charsmap.stop])
        try:
            steps.append(normalizers.Precompiled(raw))
        except Exception as error:
            raise _refuse(file, f"its table of characters can't be read: {error}") from error
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        steps.append(normalizers.Strip(left=False, right=True))
        steps.append(normalizers.Replace(Regex(" {2,}"), SPACE))
    made.normalizer = normalizers.Sequence(steps)
    scheme = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def _word_piece(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    special = {text for text in tokens if text.startswith("[") and text.endswith("]")}
    vocabulary = {}
    for index, text in enumerate(tokens):
        if text in special:
            vocabulary[text] = index
        elif text.startswith(SPACE):
            vocabulary[text[1:]] = index
        else:
            vocabulary["##" + text] = index
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 100)
    good = isinstance(unknown, int) and 0 <= unknown < len(tokens)
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens[unknown] if good else "[UNK]"))
    lower = bool(metadata.get("tokenizer.ggml.normalizer.lowercase", True))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=lower,
        strip_accents=bool(metadata.get("tokenizer.ggml.normalizer.strip_accents", lower)),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def _add_tokens(made: Any, kind: str, tokens: Sequence[str], types: Sequence[int]) -> None:
    from tokenizers import AddedToken

    special, plain = [], []
    for text, type_ in zip(tokens, types, strict=True):
        if type_ == CONTROL or (type_ == 2 and kind != "gpt2"):
            special.append(AddedToken(text, normalized=False, special=True))
        elif type_ == USER_DEFINED:
            plain.append(AddedToken(text, normalized=False, special=False))
    made.add_special_tokens(special)
    made.add_tokens(plain)


def _add_ends(made: Any, metadata: Mapping[str, Any], kind: str, tokens: Sequence[str]) -> None:
    """Tokens that every text begins or ends with; the defaults are llama.cpp's."""
    from tokenizers import processors

    pre = metadata.get("tokenizer.ggml.pre")
    always = kind in ("llama", "bert") or pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    ids = {}
    for name, default in (("bos", always), ("eos", kind == "t5")):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        if wanted and isinstance(number, int) and 0 <= number < len(tokens):
            ids[name] = number
    separator = metadata.get("tokenizer.ggml.seperator_token_id")
    if kind == "bert" and isinstance(separator, int) and 0 <= separator < len(tokens):
        ids["eos"] = separator
    if not ids:
        return
    # In a template a colon, a dollar sign in front, and nothing at all mean something else.
    names = {
        name: tokens[number] if _PIECE.fullmatch(tokens[number]) else name.upper()
        for name, number in ids.items()
    }
    first = [names["bos"]] if "bos" in ids else []
    last = [names["eos"]] if "eos" in ids else []
    made.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B", *last],
        special_tokens=[
            {"id": names[name], "ids": [number], "tokens": [tokens[number]]}
            for name, number in ids.items()
        ],
    )
