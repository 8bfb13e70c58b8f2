"""StarCoder2: layer norms, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Field, Tensors
from quantmill_gguf.architectures.llama import Decoder

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Starcoder2"]


class Starcoder2(Decoder):
    """StarCoder2."""

    arch = "starcoder2"
    model_types = ("starcoder2",)
    cls = "Starcoder2ForCausalLM"
    activation = "gelu_pytorch_tanh"
    head_key = False
    parts: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    fields = (
        *Decoder.fields[:-1],
        Field("attention.layer_norm_epsilon", "norm_epsilon", "real", 1e-5),
    )

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["use_bias"] = "blk.0.attn_q.bias" in tensors
        config["sliding_window"] = None

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        window = config.get("sliding_window")
        if window is not None and window < config.get("max_position_embeddings", 0):
            yield f"its attention sees {window} tokens only, and llama.cpp computes it for all"
        if not config.get("use_bias", True):
            yield "it has no biases, which llama.cpp expects"
