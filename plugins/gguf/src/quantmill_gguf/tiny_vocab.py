"""Small tokenizers of every kind that a GGUF file can hold, and texts to try them on, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quantmill_gguf.vocab.read import pre_tokenizers_of
from quantmill_gguf.vocab.splits import PRE

__all__ = ["CORPUS", "SPECIAL", "TEXTS", "TOKENIZERS", "byte_level", "spm", "unigram", "word_piece"]

TEXTS = [
    "Hello world! It's 2024, isn't it? I'VE seen 1234567 of them.",
    "  two spaces,   three, and a tab\there\n\n new lines \r\n end  ",
    "Größe, naïve café, Ελληνικά, русский, 中文字符, 日本語, 한국어, ไทย",
    "emoji 🚀🦙 and \u200d joiners, combining e\u0301, 3 33 333 3333",
    "def f(x):\n    return x**2 + 1  # comment <|user|> <think> end",
    "",
    " ",
    "a",
    "I'm you're we'VE they'LL 'tis 1 12 123 1234 \u0663\u0664\u0665 \u2167",
    "a\u00a0b\u2003c\u3000d\u200be \t \n\n\n  \r\n\r x ...!!!??? --- ___ +++<<<>>> $100 \u20ac5 ^^",
    "\u0645\u0631\u062d \u06f1\u06f2 \u0928\u092e\u0938\u094d\u0924\u0947 \u0967 \u05e9\u05dc",
    "\u01c4 \u01c5 \u01c6 \u00c0\u00c9\u00ce \u00df \u0130\u0131 CamelCase HTTPServer iPhone",
    "a/b/c http://x.y/z?q=1\n//x 1e-5 \ufdfa \u2122 \u00b5 \u00aa \u2014\u2013 \u201cquoted\u201d",
    "\u00abx\u00bb \uff26\uff35\uff11 foo<|user|>bar<think>baz",
    "\n\n  \n",
    "   3 spaces    4     5",
]
CORPUS = [
    *TEXTS[:8],
    *(f"the {word} of number {n}" for n in range(50) for word in ("cat", "house")),
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


def byte_level(name: str) -> Any:
    """A byte-level BPE that cuts as llama.cpp's ``name`` does."""
    pre = PRE[name]
    made = Tokenizer(models.BPE(ignore_merges=pre.whole))
    parts = pre_tokenizers_of(pre)
    if name == "gpt-2":
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def spm(prefix: bool) -> Any:
    """A SentencePiece-like BPE, of tokenizer.json alone."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("\u2581")] if prefix else []
    made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<|user|>"],
        limit_alphabet=60,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    # The trainer takes bytes for special tokens; they are plain pieces.
    data = json.loads(made.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(data))
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def unigram() -> Any:
    """As T5 has it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "\u2581")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return made


def word_piece(lower: bool = True) -> Any:
    """As BERT has it, with or without case."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{f"bytes-{name}": partial(byte_level, name) for name in PRE},
    "spm": lambda: spm(True),
    "spm-without-prefix": lambda: spm(False),
    "unigram": unigram,
    "word-piece": word_piece,
    "word-piece-cased": partial(word_piece, False),
}
