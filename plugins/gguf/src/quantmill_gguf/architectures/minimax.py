"""MiniMax-M2: experts that are chosen by sigmoids with a correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from quantmill_gguf.architectures.family import DECODER, Config, Entry, Field, Tensors, experts
from quantmill_gguf.architectures.llama import MIXTRAL, Decoder
from quantmill_gguf.architectures.qwen import router
from quantmill_gguf.architectures.rope import parameters, read_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["MiniMaxM2"]

_SIGMOID: Final = 2
"""llama.cpp's number of the function that experts are chosen by."""


class MiniMaxM2(Decoder):
    """Queries and keys are normed whole, part of each head is rotated."""

    arch = "minimax-m2"
    model_types = ("minimax_m2",)
    cls = "MiniMaxM2ForCausalLM"
    needs_output = True
    parts: ClassVar[Mapping[str, str]] = {
        **{name: module for name, module in DECODER.items() if not module.startswith("mlp.")},
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
    fields = (
        *Decoder.fields,
        Field("expert_count", "num_local_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        for index in range(int(config["num_hidden_layers"])):
            mlp, block = f"model.layers.{index}.mlp", f"blk.{index}"
            yield router(index)
            yield Entry(f"{mlp}.e_score_correction_bias", f"{block}.exp_probs_b.bias")
        yield from experts(config, int(config["num_local_experts"]), MIXTRAL)

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        function = keys.get("expert_gating_func", _SIGMOID)
        if function != _SIGMOID:
            raise keys.unsupported(f"its experts are chosen by function {function!r:.20}")
        config["rope_parameters"] = read_rope(keys, head_dim=config["head_dim"])

    def rotated(self, config: Config) -> int:
        rope = parameters(config)
        return int(self.head_dim(config) * rope.get("partial_rotary_factor", 1.0))

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found["expert_feed_forward_length"] = config["intermediate_size"]
        found["expert_gating_func"] = _SIGMOID
        return found
