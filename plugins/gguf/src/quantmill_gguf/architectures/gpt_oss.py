"""GPT-OSS: experts with biases, attention that can attend to nothing, windows in every second
layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import DECODER, Config, Entry, Field, Tensors, experts
from quantmill_gguf.architectures.llama import Decoder

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["GptOss"]


class GptOss(Decoder):
    """20B and 120B."""

    arch = "gpt-oss"
    model_types = ("gpt_oss",)
    cls = "GptOssForCausalLM"
    needs_output = True
    parts: ClassVar[Mapping[str, str]] = {
        **{name: module for name, module in DECODER.items() if not name.startswith("ffn_")},
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
    }
    fields = (
        # The width of an expert is stated twice, and once in some files.
        *(item for item in Decoder.fields if item.name != "intermediate_size"),
        Field("expert_feed_forward_length", "intermediate_size"),
        Field("expert_count", "num_local_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
        Field("attention.sliding_window", "sliding_window", default=128),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        for index in range(int(config["num_hidden_layers"])):
            sinks = f"model.layers.{index}.self_attn.sinks"
            yield Entry(sinks, f"blk.{index}.attn_sinks.weight")
        yield from experts(config, int(config["num_local_experts"]))

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        rope = config["rope_parameters"]
        if rope["rope_type"] == "yarn":
            # The model was trained so, and files don't state it.
            rope.setdefault("beta_fast", 32.0)
            rope.setdefault("beta_slow", 1.0)
            rope["truncate"] = False
        config["layer_types"] = self.windows(config["num_hidden_layers"])
        config["attention_bias"] = True

    @staticmethod
    def windows(count: int) -> list[str]:
        """Layers of a window and of all tokens by turns."""
        return ["full_attention" if index % 2 else "sliding_attention" for index in range(count)]

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found["feed_forward_length"] = found["expert_feed_forward_length"]
        return found

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        kinds = list(config.get("layer_types") or [])
        if kinds and kinds != self.windows(len(kinds)):
            yield "its windows are not in every second layer, which is where llama.cpp has them"
        for name, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
            if config.get(name, value) != value:
                yield f"{name} is {config[name]}, and llama.cpp takes {value}"
