"""Roles and layers from names, for when a framework does not tell."""

from __future__ import annotations

import re

__all__ = ["guess_layer", "guess_role"]

_LAYER = re.compile(
    r"(?:^|\.)(?:layers?|h|(?:single_)?(?:transformer_)?blocks?|encoder|decoder|resblocks)"
    r"\.(\d+)(?:\.|$)"
)
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(lm_head|embed_out|output_projection|classifier|score)$|^output$", "head"),
    (
        r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|position_embeddings|token_type_embeddings"
        r"|tok_embeddings|shared|embed_positions|embed_in|embeddings)$",
        "embedding",
    ),
    (r"(norm|ln_\w+|ln\d?|layernorm|layer_norm\w*)$", "norm"),
    (r"(^|\.)experts(\.|$)", "expert"),
    (r"(^|\.)(router|gate|shared_expert_gate)(\.|$)", "router"),
    (
        r"(^|\.)(self_attn|attention|attn\d?|self_attention|crossattention|SelfAttention"
        r"|EncDecAttention|encoder_attn)(\.|$)",
        "attention",
    ),
    (
        r"(^|\.)(mlp|feed_forward|ffn?|ff_context|DenseReluDense|intermediate|fc1|fc2|output)(\.|$)",
        "mlp",
    ),
)
_COMPILED = tuple((re.compile(pattern), role) for pattern, role in _ROLES)


def guess_role(name: str, cls: str) -> str | None:
    """``attention``, ``mlp``, ``head``, ... or None; ``cls`` is the class's name, if known."""
    if "norm" in cls.lower():
        return "norm"
    if cls == "Embedding":
        return "embedding"
    for pattern, role in _COMPILED:
        if pattern.search(name):
            return role
    return None


def guess_layer(name: str) -> int | None:
    """The index of the block a module is in: the first number after a word for blocks."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None
