"""Small tokenizers of every kind: ids of the tokenizer, of llama.cpp with our file, and of ours.

Where llama.cpp cuts otherwise, the export must have said so; where it said nothing, no text may
differ.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, Final

from llamacpp import Llama

from quantmill_gguf.tiny_vocab import TEXTS, TOKENIZERS
from quantmill_gguf.tokenizer import load_tokenizer
from quantmill_gguf.vocab.model import Files, Vocabulary
from quantmill_gguf.vocab.write import vocabulary_of
from quantmill_gguf.writer import GgufWriter

SIZES: Final[dict[str, Any]] = {
    **dict.fromkeys(("block_count", "attention.head_count"), 1),
    **dict.fromkeys(("context_length", "embedding_length", "feed_forward_length"), 32),
    **dict.fromkeys(("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"), 1e-5),
    "attention.relative_buckets_count": 32,
    "attention.causal": True,
}
ARCHITECTURES: Final = {"gpt2": "llama", "llama": "llama", "t5": "t5", "bert": "bert"}
"""One whose files may have a vocabulary of that kind."""


def texts(count: int = 600) -> list[str]:
    """Texts of the tests, and random ones of signs that cutting depends on."""
    ranges = ((33, 127), (0xA1, 0x250), (0x370, 0x500), (0x4E00, 0x4E40), (0xAC00, 0xAC10))
    signs = [chr(code) for start, stop in ranges for code in range(start, stop)]
    signs += [*" \n\r\t\u3000\u2028\u0301\u200d\U0001f600"] * 12
    chance = random.Random(0)
    more = ("".join(chance.choices(signs, k=chance.randint(1, 24))) for _ in range(count))
    # A unigram of the tests drops text of spaces alone; T5's own table of characters makes that so.
    return [*TEXTS, *(text for text in more if text.strip())]


def exported(name: str, folder: Path) -> tuple[Any, Vocabulary, Path]:
    """A tokenizer, its vocabulary and a file of that alone."""
    made = TOKENIZERS[name]()
    made.save(str(folder / "tokenizer.json"))
    files = Files(lambda item: p.read_bytes() if (p := folder / item).is_file() else None)
    found = vocabulary_of(files, {})
    assert found is not None
    arch = ARCHITECTURES[found.model]
    sizes = {f"{arch}.{key}": value for key, value in SIZES.items()}
    metadata = {"general.architecture": arch, f"{arch}.vocab_size": len(found.tokens), **sizes}
    path = folder / "vocabulary.gguf"
    with GgufWriter(path, {**metadata, **found.metadata()}, [], kinds=found.kinds):
        pass
    return made, found, path


def tokens(bins: Path) -> bool:
    """Compare all tokenizers."""
    llama, good = Llama(bins), True
    for name in TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            made, found, path = exported(name, Path(folder))
            back = load_tokenizer(path)
            apart, ours = [], []
            with llama.model(path, vocabulary=True) as model:
                for text in texts():
                    wanted = made.encode(text).ids
                    if llama.tokens(model, text) != wanted and text.strip():
                        apart.append(text)
                    if back(text)["input_ids"] != wanted:
                        ours.append(text)
        fine = not ours and (not apart or bool(found.notes))
        good &= fine
        told = f"; announced: {'; '.join(found.notes)}" if found.notes else ""
        words = "" if fine else f"; WRONG, {(ours or apart)[:2]!r}"
        print(
            f"{name}: {len(texts())} texts, {len(apart)} differ in llama.cpp, {len(ours)} as we"
            f" read it{told}{words}",
            flush=True,
        )
    return good
