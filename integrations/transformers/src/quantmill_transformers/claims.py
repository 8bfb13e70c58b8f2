"""What is transformers' own about which ``from_pretrained`` calls are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from quantmill.takeover import without_variants

__all__ = ["stored_config_of", "theirs"]


def theirs() -> set[str]:
    """Values of ``quant_method`` that the installed transformers reads itself."""
    return without_variants(AUTO_QUANTIZER_MAPPING)


def stored_config_of(config: Any) -> Any:
    """The ``quantization_config`` of a checkpoint from its config, which may be a nested one's."""
    data = config if isinstance(config, Mapping) else None
    if data is None:
        stored = getattr(config, "quantization_config", None)
        if stored is None:
            text = config.get_text_config(decoder=True)
            stored = getattr(text, "quantization_config", None)
        return stored
    text = data.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    return data.get("quantization_config") or nested
