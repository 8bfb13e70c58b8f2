"""Qwen 3.5: gated delta nets, attention with a gate in every fourth block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from quantmill_gguf.architectures.family import DECODER, Config, Entry, Field, Tensors, experts
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.moves import (
    Both,
    MinusExp,
    Move,
    PlusOne,
    Squeezed,
    TiledColumns,
    TiledHeads,
)
from quantmill_gguf.architectures.qwen import router, shared_expert
from quantmill_gguf.architectures.rope import parameters, read_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Qwen35", "Qwen35Moe"]

_SECTIONS: Final = (11, 11, 10, 0)
"""Of a rotary embedding in three axes, where a config does not say."""
_DELTA: Final[Mapping[str, str]] = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}


class Qwen35(Decoder):
    """The text model, dense. A block that predicts further tokens is left out."""

    arch = "qwen35"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5_text",)
    cls = "Qwen3_5ForCausalLM"
    norms = PlusOne()
    parts: ClassVar[Mapping[str, str]] = {
        **{name: module for name, module in DECODER.items() if name != "ffn_norm"},
        "post_attention_norm": "post_attention_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        **_DELTA,
    }
    fields: ClassVar[tuple[Field, ...]] = (
        *Decoder.fields,
        Field("ssm.conv_kernel", "linear_conv_kernel_dim"),
        Field("ssm.state_size", "linear_key_head_dim"),
        Field("ssm.group_count", "linear_num_key_heads"),
        Field("ssm.time_step_rank", "linear_num_value_heads"),
    )

    def moves(self, config: Config) -> Mapping[str, Move]:
        keys, heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
        width = int(config["linear_value_head_dim"])
        before = 2 * keys * int(config["linear_key_head_dim"])
        each = heads // keys
        joined = TiledHeads(keys, each, width, before)
        return {
            "attn_qkv": joined,
            "attn_gate": TiledHeads(keys, each, width),
            "ssm_alpha": TiledHeads(keys, each),
            "ssm_beta": TiledHeads(keys, each),
            "ssm_conv1d": Both(joined, Squeezed(1, 3)),
            "ssm_out": TiledColumns(keys, each, width) if each > 1 else Move(),
        }

    def entries(self, config: Config) -> Iterator[Entry]:
        for entry in super().entries(config):
            # The one norm that adds nothing.
            plain = entry.tensor.endswith("ssm_norm.weight")
            yield Entry(entry.parameter, entry.tensor) if plain else entry
        keys, heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
        order = TiledHeads(keys, heads // keys)
        for index in range(int(config["num_hidden_layers"])):
            net = f"model.layers.{index}.linear_attn"
            yield Entry(f"{net}.A_log", f"blk.{index}.ssm_a", Both(order, MinusExp()))
            yield Entry(f"{net}.dt_bias", f"blk.{index}.ssm_dt.bias", order)

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["num_hidden_layers"] -= self.further(keys, config["num_hidden_layers"])
        count = config["num_hidden_layers"]
        heads, groups = config["linear_num_value_heads"], config["linear_num_key_heads"]
        inner = keys.whole("ssm.inner_size")
        if heads % groups or inner % heads:
            raise keys.refuse("ssm.time_step_rank", heads, f"heads for {groups} keys in {inner}")
        config["linear_value_head_dim"] = inner // heads
        every = keys.whole("full_attention_interval", 4)
        recurrent = keys.flags("attention.recurrent_layers", count)
        if recurrent is None:
            recurrent = [bool((index + 1) % every) for index in range(count)]
        config["layer_types"] = [
            "linear_attention" if item else "full_attention" for item in recurrent
        ]
        rope = read_rope(keys, head_dim=config["head_dim"])
        rope["mrope_interleaved"] = True
        sections = keys.get("rope.dimension_sections")
        if sections is not None:
            rope["mrope_section"] = keys.wholes("rope.dimension_sections", 4)[:3]
        config["rope_parameters"] = rope

    @staticmethod
    def further(keys: Keys, count: int) -> int:
        """Blocks at the end that predict further tokens."""
        if not keys.get("nextn_predict_layers"):
            return 0
        number = keys.whole("nextn_predict_layers")
        if number >= count:
            raise keys.refuse("nextn_predict_layers", number, f"fewer than {count} blocks")
        return number

    def rotated(self, config: Config) -> int:
        rope = parameters(config)
        return int(self.head_dim(config) * rope.get("partial_rotary_factor", 0.25))

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        width = config["linear_value_head_dim"]
        found["ssm.inner_size"] = width * config["linear_num_value_heads"]
        kinds = self.kinds(config)
        found["full_attention_interval"] = kinds.index("full_attention") + 1
        sections = list(parameters(config).get("mrope_section") or _SECTIONS)
        found["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
        return found

    @staticmethod
    def kinds(config: Config) -> list[str]:
        """Of the blocks."""
        count = int(config["num_hidden_layers"])
        made = ["linear_attention"] * 3 + ["full_attention"]
        return list(config.get("layer_types") or (made * count)[:count])

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        kinds = self.kinds(config)
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
        wanted = [
            "linear_attention" if not every or (index + 1) % every else "full_attention"
            for index in range(len(kinds))
        ]
        if not every or kinds != wanted:
            yield "attention is not in every n-th block, which is where llama.cpp has it"
        if config["linear_value_head_dim"] != config["linear_key_head_dim"]:
            yield "heads of keys and values differ in width, which llama.cpp does not expect"
        if config.get("attention_bias"):
            yield "its attention has biases, which llama.cpp does not add"


class Qwen35Moe(Qwen35):
    """With experts, and one that all tokens share."""

    arch = "qwen35moe"
    model_types = ("qwen3_5_moe_text",)
    cls = "Qwen3_5MoeForCausalLM"
    parts: ClassVar[Mapping[str, str]] = {
        name: module for name, module in Qwen35.parts.items() if not module.startswith("mlp.")
    }
    fields = (
        *(item for item in Qwen35.fields if item.name != "intermediate_size"),
        Field("expert_count", "num_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
        Field("expert_feed_forward_length", "moe_intermediate_size"),
        Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        for index in range(int(config["num_hidden_layers"])):
            yield router(index)
        yield from shared_expert(config)
        yield from experts(config, int(config["num_experts"]))
