"""Phi-3: fused projections, in the file as in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Tensors
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.rope import read_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Phi3"]


class Phi3(Decoder):
    """Phi-3 and Phi-4."""

    arch = "phi3"
    model_types = ("phi3",)
    cls = "Phi3ForCausalLM"
    head_key = False
    parts: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        width = config["hidden_size"] // config["num_attention_heads"]
        config["rope_parameters"] = read_rope(keys, head_dim=width)
        original = keys.get("rope.scaling.original_context_length")
        config["original_max_position_embeddings"] = (
            keys.whole("rope.scaling.original_context_length")
            if original is not None
            else config["max_position_embeddings"]
        )
        window = keys.get("attention.sliding_window")
        config["sliding_window"] = keys.whole("attention.sliding_window") if window else None

    def rotated(self, config: Config) -> int:
        from quantmill_gguf.architectures.rope import parameters

        return int(self.head_dim(config) * parameters(config).get("partial_rotary_factor", 1.0))

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        original = config.get("original_max_position_embeddings")
        found["rope.scaling.original_context_length"] = (
            original or config["max_position_embeddings"]
        )
        found["attention.sliding_window"] = config.get("sliding_window") or 0
        return found

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        window = config.get("sliding_window")
        if window is not None and window < config.get("max_position_embeddings", 0):
            yield (
                f"its attention sees {window} tokens only, and llama.cpp computes it for all: they"
                " differ in texts longer than that"
            )
