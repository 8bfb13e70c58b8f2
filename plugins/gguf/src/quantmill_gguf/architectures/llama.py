"""Llama, Mistral and Mixtral: one architecture of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from quantmill_gguf.architectures.family import (
    Config,
    Entry,
    Family,
    Field,
    Tensors,
    experts,
)
from quantmill_gguf.architectures.moves import Heads, Move
from quantmill_gguf.architectures.rope import read_rope, write_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["MIXTRAL", "Decoder", "Llama"]


MIXTRAL: Final = ("w1", "w3", "w2")
"""Mixtral's names of an expert's gate, up and down."""


class Decoder(Family):
    """A decoder with RMS norms, grouped queries and a rotary embedding of whole heads."""

    fields: ClassVar[tuple[Field, ...]] = (
        Field("block_count", "num_hidden_layers"),
        Field("context_length", "max_position_embeddings", default=2048),
        Field("embedding_length", "hidden_size"),
        Field("feed_forward_length", "intermediate_size"),
        Field("attention.head_count", "num_attention_heads"),
        Field("attention.head_count_kv", "num_key_value_heads", default="num_attention_heads"),
        Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", "real", 1e-5),
    )
    activation: ClassVar[str] = "silu"
    head_key: ClassVar[bool] = True
    """The class has a ``head_dim`` of its own in its config."""

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        heads = config["num_attention_heads"]
        width = keys.whole("attention.key_length", max(1, config["hidden_size"] // heads))
        if self.head_key:
            config["head_dim"] = width
        elif width * heads != config["hidden_size"]:
            raise keys.refuse("attention.key_length", width, "the width of a head")
        config["hidden_act"] = self.activation
        config["rope_parameters"] = read_rope(keys)

    def head_dim(self, config: Config) -> int:
        """Width of a head."""
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return int(width)

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        width = self.head_dim(config)
        found |= {"attention.key_length": width, "attention.value_length": width}
        found["rope.dimension_count"] = self.rotated(config)
        found["vocab_size"] = config["vocab_size"]
        return found | write_rope(config, self.rotated(config))[0]

    def rotated(self, config: Config) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim(config)

    def extra(self, config: Config) -> Mapping[str, list[float]]:
        return write_rope(config, self.rotated(config))[1]

    def problems(self, config: Config) -> Iterator[str]:
        problem = write_rope(config, self.rotated(config))[2]
        if problem:
            yield problem
        act = config.get("hidden_act") or config.get("hidden_activation") or self.activation
        if act != self.activation:
            yield f"its activation is {act}, and llama.cpp computes {self.activation}"


class Llama(Decoder):
    """Rows of Q and K interleaved for llama.cpp's rotary embedding; experts where there are."""

    arch = "llama"
    model_types = ("llama", "mistral", "mixtral")
    cls = "LlamaForCausalLM"

    def moves(self, config: Config) -> Mapping[str, Move]:
        heads = int(config["num_attention_heads"])
        pairs = int(config.get("num_key_value_heads") or heads)
        return {"attn_q": Heads(heads), "attn_k": Heads(pairs)}

    def class_of(self, config: Config) -> str:
        return {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM"}.get(
            config["model_type"], self.cls
        )

    def entries(self, config: Config) -> Iterator[Entry]:
        if config["model_type"] != "mixtral":
            yield from super().entries(config)
            return
        for entry in super().entries(config):
            if ".mlp." not in entry.parameter:
                yield entry
        for index in range(int(config["num_hidden_layers"])):
            gate = f"model.layers.{index}.mlp.gate.weight"
            yield Entry(gate, f"blk.{index}.ffn_gate_inp.weight")
        yield from experts(config, int(config["num_local_experts"]), MIXTRAL)

    def older(self, config: Config, tensors: Tensors) -> Iterator[Entry]:
        """Experts as files of 2023 have them: one matrix each."""
        if config["model_type"] != "mixtral" or "blk.0.ffn_gate.0.weight" not in tensors:
            return
        for index in range(int(config["num_hidden_layers"])):
            for expert in range(int(config["num_local_experts"])):
                for part, leaf in zip(("gate", "up", "down"), MIXTRAL, strict=True):
                    name = f"model.layers.{index}.mlp.experts.{expert}.{leaf}.weight"
                    yield Entry(name, f"blk.{index}.ffn_{part}.{expert}.weight")

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        if keys.get("expert_count"):
            config["model_type"] = "mixtral"
            config["num_local_experts"] = keys.whole("expert_count")
            config["num_experts_per_tok"] = keys.whole("expert_used_count")
            return
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        if config["model_type"] == "mixtral":
            found["expert_count"] = config["num_local_experts"]
            found["expert_used_count"] = config["num_experts_per_tok"]
        return found

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        window = config.get("sliding_window")
        if window is not None and window < config.get("max_position_embeddings", 0):
            yield (
                f"its attention sees {window} tokens only, and llama.cpp computes it for all: they"
                " differ in texts longer than that"
            )
