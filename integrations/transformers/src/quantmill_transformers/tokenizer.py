"""Tokenizers from a source, through transformers."""

from __future__ import annotations

from typing import Any

from quantmill.checkpoint.source import Source

__all__ = ["load_tokenizer"]

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "config.json",
)


def load_tokenizer(source: Source) -> Any:
    """The fast tokenizer of a source, or None when it has no tokenizer files."""
    present = [name for name in _FILES if source.exists(name)]
    paths = [source.local_path(name) for name in present]
    if not any(name.startswith(("tokenizer.", "vocab", "spiece")) for name in present):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = paths[0].parent
    if "tokenizer_config.json" not in present and "tokenizer.json" in present:
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
