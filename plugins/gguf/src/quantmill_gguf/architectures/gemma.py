"""Gemma 1 to 3: norms that add one to their weight, a scaled embedding, windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import DECODER, Config, Field, Tensors
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.moves import Move, PlusOne

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["PARTS", "Gemma", "Gemma2", "Gemma3"]

PARTS: Mapping[str, str] = {
    **DECODER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_27B = 46
"""Layers of Gemma 2 27B, whose queries are scaled otherwise."""


class Gemma(Decoder):
    """The first Gemma."""

    arch = "gemma"
    model_types: ClassVar[tuple[str, ...]] = ("gemma",)
    cls = "GemmaForCausalLM"
    activation = "gelu_pytorch_tanh"
    norms: ClassVar[Move] = PlusOne()

    def problems(self, config: Config) -> Iterator[str]:
        act = config.get("hidden_activation") or config.get("hidden_act")
        # Early configs say gelu and mean its approximation, which the library computes too.
        if act not in (None, "gelu", "gelu_pytorch_tanh"):
            yield f"its activation is {act}, and llama.cpp computes {self.activation}"
        if config.get("attention_bias"):
            yield "its attention has biases, which llama.cpp does not add"

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["hidden_activation"] = self.activation


class Gemma2(Gemma):
    """Norms after attention and MLP, capped logits, a window in every second layer."""

    arch = "gemma2"
    model_types = ("gemma2",)
    cls = "Gemma2ForCausalLM"
    parts = PARTS
    fields = (
        *Decoder.fields,
        Field("attention.sliding_window", "sliding_window", default=4096),
        Field("attn_logit_softcapping", "attn_logit_softcapping", "real", 50.0),
        Field("final_logit_softcapping", "final_logit_softcapping", "real", 30.0),
    )

    def scale_of(self, config: Config) -> int:
        """What llama.cpp divides queries by the root of."""
        if config["num_hidden_layers"] == _27B:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return self.head_dim(config)

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["query_pre_attn_scalar"] = self.scale_of(config)

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        scale = config.get("query_pre_attn_scalar")
        if scale is not None and not math.isclose(scale, self.scale_of(config)):
            yield f"queries are scaled by {scale}, and llama.cpp takes {self.scale_of(config)}"
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(name) is None:
                yield f"{name} is off, and llama.cpp takes a default then"
        kinds = config.get("layer_types")
        if kinds and list(kinds) != _pattern(len(kinds), 2):
            yield "its windows are not in every second layer, which is where llama.cpp has them"


class Gemma3(Gemma):
    """Norms of queries and keys; windows, with a rotary embedding of their own, in five of six
    layers."""

    arch = "gemma3"
    model_types = ("gemma3_text", "gemma3")
    cls = "Gemma3ForCausalLM"
    parts: ClassVar[Mapping[str, str]] = {
        **PARTS,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
    fields = Decoder.fields
    layers_27b = 62

    def scale_of(self, config: Config) -> int:
        """What llama.cpp divides queries by the root of."""
        if config["num_hidden_layers"] == self.layers_27b:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return self.head_dim(config)

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        whole = config["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10000.0)}
        config["rope_parameters"] = {"full_attention": whole, "sliding_attention": local}
        config["query_pre_attn_scalar"] = self.scale_of(config)
        count = config["num_hidden_layers"]
        window = keys.get("attention.sliding_window")
        config["layer_types"] = ["full_attention"] * count
        if window:
            config["sliding_window"] = keys.whole("attention.sliding_window")
            config["layer_types"] = _pattern(count, 6)
        capped = keys.get("final_logit_softcapping")
        config["final_logit_softcapping"] = keys.real("final_logit_softcapping") if capped else None

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        kinds = config.get("layer_types") or []
        if "sliding_attention" in kinds or not kinds:
            from quantmill_gguf.architectures.rope import parameters

            found["attention.sliding_window"] = config["sliding_window"]
            local = parameters(config, "sliding_attention")
            found["rope.freq_base_swa"] = float(local["rope_theta"])
        if config.get("final_logit_softcapping"):
            found["final_logit_softcapping"] = float(config["final_logit_softcapping"])
        return found

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        scale = config.get("query_pre_attn_scalar")
        if scale is not None and not math.isclose(scale, self.scale_of(config)):
            yield f"queries are scaled by {scale}, and llama.cpp takes {self.scale_of(config)}"
        if config.get("attn_logit_softcapping"):
            yield "its attention's logits are capped, which llama.cpp does not do for Gemma 3"
        kinds = list(config.get("layer_types") or [])
        if kinds and kinds not in (_pattern(len(kinds), 6), ["full_attention"] * len(kinds)):
            yield "its windows are not in five of six layers, which is where llama.cpp has them"


def _pattern(count: int, every: int) -> list[str]:
    """Every ``every``-th layer sees all tokens, the others a window."""
    return [
        "sliding_attention" if (index + 1) % every else "full_attention" for index in range(count)
    ]
