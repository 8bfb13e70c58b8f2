"""LFM2: short convolutions, attention in some of the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Field, Tensors
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.moves import Move, Squeezed
from quantmill_gguf.architectures.rope import read_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Lfm2"]


class Lfm2(Decoder):
    """Dense LFM2."""

    arch = "lfm2"
    model_types = ("lfm2",)
    cls = "Lfm2ForCausalLM"
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "model.embed_tokens",
        "token_embd_norm": "model.embedding_norm",
        "output": "lm_head",
    }
    parts: ClassVar[Mapping[str, str]] = {
        "attn_norm": "operator_norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_norm": "ffn_norm",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
    }
    fields = (
        *(item for item in Decoder.fields[:-1] if item.name != "num_key_value_heads"),
        Field("attention.layer_norm_rms_epsilon", "norm_eps", "real", 1e-5),
        Field("shortconv.l_cache", "conv_L_cache"),
    )

    def moves(self, config: Config) -> Mapping[str, Move]:
        return {"shortconv.conv": Squeezed(1, 3)}

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        # Blocks of convolutions have no heads.
        heads = keys.wholes("attention.head_count_kv", config["num_hidden_layers"])
        if not any(heads) or len({*heads} - {0}) != 1:
            raise keys.refuse("attention.head_count_kv", heads, "one number of heads, or none")
        config["num_key_value_heads"] = max(heads)
        config["layer_types"] = ["full_attention" if item else "conv" for item in heads]
        config["block_auto_adjust_ff_dim"] = False
        config["conv_bias"] = any(name.endswith("shortconv.in_proj.bias") for name in tensors)
        config["rope_parameters"] = read_rope(keys, base=1000000.0)

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        heads = config["num_key_value_heads"]
        found["attention.head_count_kv"] = [
            heads if kind == "full_attention" else 0 for kind in config["layer_types"]
        ]
        found["feed_forward_length"] = self.inner(config)
        return found

    @staticmethod
    def inner(config: Config) -> int:
        """Width of the MLP. Source: ``Lfm2MLP`` of transformers."""
        width = int(config["intermediate_size"])
        if config.get("block_auto_adjust_ff_dim", True):
            width = int(2 * width / 3)
            factor = config.get("block_ffn_dim_multiplier", 1.0)
            if factor is not None:
                width = int(factor * width)
                every = int(config.get("block_multiple_of", 256))
                width = every * -(-width // every)
        return width
