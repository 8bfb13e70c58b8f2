"""The tokenizer in a GGUF file, as transformers has tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from quantmill_gguf.container import Array, GgufFile
from quantmill_gguf.vocab.read import tokenizer_of

__all__ = ["load_tokenizer"]

_SPECIAL: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer in a file, with its chat template; None where it has no vocabulary, or
    transformers is not installed.

    Raises:
        QuantmillError: the file or its vocabulary is damaged, or of a kind that is not known.
    """
    metadata = GgufFile.open(path).metadata
    if "tokenizer.ggml.model" not in metadata:
        return None
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    backend = tokenizer_of(metadata, path.name)
    if backend is None:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    wanted = {}
    for name, key in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            wanted[f"{name}_token"] = backend.id_to_token(number)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in wanted.items() if text is not None},
    )
    template = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates")
    if isinstance(template, str):
        made.chat_template = template
    if isinstance(names, Array) and names.kind == 8:
        found = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}
        named = {name: text for name, text in found.items() if isinstance(text, str)}
        if named:
            first = {"default": template} if isinstance(template, str) else {}
            made.chat_template = {**first, **named}
    return made
