"""BLOOM: ALiBi, a norm after the embedding, a fused projection of every head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Family, Field, Tensors
from quantmill_gguf.architectures.moves import Move, PerHeadQkv

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Bloom"]


class Bloom(Family):
    """BLOOM."""

    arch = "bloom"
    model_types = ("bloom",)
    cls = "BloomForCausalLM"
    layer_key = "n_layer"
    prefix = "transformer.h"
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "transformer.word_embeddings",
        "token_embd_norm": "transformer.word_embeddings_layernorm",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }
    parts: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    }
    fields = (
        Field("block_count", "n_layer"),
        Field("embedding_length", "hidden_size"),
        Field("attention.head_count", "n_head"),
        Field("attention.layer_norm_epsilon", "layer_norm_epsilon", "real", 1e-5),
    )

    def moves(self, config: Config) -> Mapping[str, Move]:
        return {"attn_qkv": PerHeadQkv(int(config["n_head"]))}

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        config["apply_residual_connection_post_layernorm"] = False

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found["context_length"] = config.get("seq_length") or 2048
        found["feed_forward_length"] = 4 * config["hidden_size"]
        found["attention.head_count_kv"] = config["n_head"]
        return found

    def problems(self, config: Config) -> Iterator[str]:
        if config.get("apply_residual_connection_post_layernorm"):
            yield "its residuals come after the norms, which llama.cpp does not compute"
