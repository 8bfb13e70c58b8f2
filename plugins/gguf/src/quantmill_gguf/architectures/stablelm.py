"""StableLM: layer norms, part of each head rotated, norms for every head in the largest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantmill_gguf.architectures.family import Config, Entry, Field, Tensors
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.rope import parameters, read_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["StableLm"]


class StableLm(Decoder):
    """StableLM 3B to 12B."""

    arch = "stablelm"
    model_types = ("stablelm",)
    cls = "StableLmForCausalLM"
    head_key = False
    needs_output = True
    fields = (
        *Decoder.fields[:-1],
        Field("attention.layer_norm_epsilon", "layer_norm_eps", "real", 1e-5),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        if not config.get("qk_layernorm"):
            return
        for index in range(int(config["num_hidden_layers"])):
            for part, key in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                for head in range(int(config[key])):
                    yield Entry(
                        f"model.layers.{index}.self_attn.{part}_layernorm.norms.{head}.weight",
                        f"blk.{index}.attn_{part}_norm.weight",
                        part=head,
                    )

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        width = config["hidden_size"] // config["num_attention_heads"]
        config["rope_parameters"] = read_rope(keys, head_dim=width)
        config["use_qkv_bias"] = "blk.0.attn_q.bias" in tensors
        config["qk_layernorm"] = "blk.0.attn_q_norm.weight" in tensors
        config["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors

    def rotated(self, config: Config) -> int:
        return int(self.head_dim(config) * parameters(config).get("partial_rotary_factor", 1.0))

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found["use_parallel_residual"] = bool(config.get("use_parallel_residual"))
        return found
