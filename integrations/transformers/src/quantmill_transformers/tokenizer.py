"""Tokenizers from a source, through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantmill.checkpoint.source import Source
from quantmill.findings import QuantmillError, declare

__all__ = ["load_tokenizer"]

BAD_TOKENIZER = declare("QM-TF-004", "The tokenizer's files can't be read")

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


def load_tokenizer(source: Source) -> Any:
    """The fast tokenizer of a source, or None when it has no tokenizer files.

    Raises:
        QuantmillError: the files are there and transformers can't read them.
    """
    present = [name for name in (*_VOCABULARIES, *_SETTINGS) if source.exists(name)]
    if not any(name in _VOCABULARIES for name in present):
        return None
    folder = next(source.local_path(name) for name in present).parent
    try:
        if "tokenizer.json" in present and "tokenizer_config.json" not in present:
            return _bare(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise QuantmillError(
            BAD_TOKENIZER(
                source.describe(),
                f"{type(error).__name__}: {error}".splitlines()[0],
                "get the tokenizer's files again, or update transformers",
            )
        ) from error


def _bare(folder: Path) -> Any:
    """A tokenizer of ``tokenizer.json`` alone, with the special tokens that the model's config
    names by id. A class that the model type suggests might want files that are not there."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            ids |= json.loads((folder / name).read_text(encoding="utf-8"))
    for kind in ("bos", "eos", "pad"):
        value = ids.get(f"{kind}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < len(tokenizer):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(value))
    return tokenizer
