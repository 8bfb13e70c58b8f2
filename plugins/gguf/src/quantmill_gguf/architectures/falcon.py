"""Falcon: one fused projection of grouped queries, attention and MLP side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Entry, Family, Field, Tensors
from quantmill_gguf.architectures.moves import GroupedQkv, Move
from quantmill_gguf.architectures.rope import read_rope, write_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Falcon"]


class Falcon(Family):
    """Falcon 7B (one norm, one key) and 40B (two norms, groups of keys)."""

    arch = "falcon"
    model_types = ("falcon",)
    cls = "FalconForCausalLM"
    prefix = "transformer.h"
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "transformer.word_embeddings",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }
    parts: ClassVar[Mapping[str, str]] = {
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    }
    fields = (
        Field("block_count", "num_hidden_layers"),
        Field("context_length", "max_position_embeddings", default=2048),
        Field("embedding_length", "hidden_size"),
        Field("feed_forward_length", "ffn_hidden_size"),
        Field("attention.head_count", "num_attention_heads"),
        Field("attention.head_count_kv", "num_kv_heads", default="num_attention_heads"),
        Field("attention.layer_norm_epsilon", "layer_norm_epsilon", "real", 1e-5),
    )

    def moves(self, config: Config) -> Mapping[str, Move]:
        return {"attn_qkv": GroupedQkv(int(config["num_attention_heads"]), self.groups(config))}

    @staticmethod
    def groups(config: Config) -> int:
        """Keys, each with the queries that share it."""
        if config.get("new_decoder_architecture"):
            return int(config.get("num_kv_heads") or config["num_attention_heads"])
        return 1 if config.get("multi_query") else int(config["num_attention_heads"])

    @staticmethod
    def two_norms(config: Config) -> bool:
        """Attention and MLP have norms of their own."""
        number = config.get("num_ln_in_parallel_attn")
        return bool(config.get("new_decoder_architecture")) and number in (None, 2)

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        names = {"attn_norm": "input_layernorm"}
        if self.two_norms(config):
            # The file calls the norm of the MLP attn_norm, as in a model with one.
            names = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
        for index in range(int(config["num_hidden_layers"])):
            for tensor, name in names.items():
                for local in ("weight", "bias"):
                    yield Entry(
                        f"{self.prefix}.{index}.{name}.{local}",
                        f"blk.{index}.{tensor}.{local}",
                    )

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        config["new_decoder_architecture"] = "blk.0.attn_norm_2.weight" in tensors
        if not config["new_decoder_architecture"]:
            config["multi_query"] = config["num_kv_heads"] == 1
        config |= {"parallel_attn": True, "alibi": False, "activation": "gelu"}
        config["bias"] = "blk.0.attn_qkv.bias" in tensors
        config["rope_parameters"] = read_rope(keys)

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found.setdefault("feed_forward_length", 4 * config["hidden_size"])
        found["attention.head_count_kv"] = self.groups(config)
        found["tensor_data_layout"] = "jploski"
        width = config["hidden_size"] // config["num_attention_heads"]
        return found | write_rope(config, width)[0]

    def problems(self, config: Config) -> Iterator[str]:
        if config.get("alibi"):
            yield "it has ALiBi in place of a rotary embedding, which llama.cpp does not compute"
        if not config.get("parallel_attn", True):
            yield "attention and MLP follow each other, and llama.cpp computes them side by side"
        if config.get("bias"):
            yield "its linears have biases, which llama.cpp does not add"
        if config.get("new_decoder_architecture") and not self.two_norms(config):
            yield "it is a new decoder with one norm, which llama.cpp does not know"
