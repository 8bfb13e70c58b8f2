"""Qwen 2 and 3, dense and with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantmill_gguf.architectures.family import DECODER, Config, Entry, Field, Tensors, experts
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.moves import Squeezed

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "router", "shared_expert"]

_NORMED: Mapping[str, str] = {
    **DECODER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def _window(config: Config) -> Iterator[str]:
    if config.get("use_sliding_window"):
        yield "some of its layers see a window of tokens only, and llama.cpp computes all for all"


def router(index: int) -> Entry:
    """The entry of what chooses a block's experts."""
    return Entry(f"model.layers.{index}.mlp.gate.weight", f"blk.{index}.ffn_gate_inp.weight")


def shared_expert(config: Config) -> Iterator[Entry]:
    """Entries of an expert that all tokens share, and of its gate: a vector in the file."""
    for index in range(int(config["num_hidden_layers"])):
        name, tensor = f"model.layers.{index}.mlp", f"blk.{index}.ffn"
        gate = f"{tensor}_gate_inp_shexp.weight"
        yield Entry(f"{name}.shared_expert_gate.weight", gate, Squeezed(0, 2))
        for part in ("gate", "up", "down"):
            yield Entry(f"{name}.shared_expert.{part}_proj.weight", f"{tensor}_{part}_shexp.weight")


class Qwen2(Decoder):
    """Biases on Q, K and V."""

    arch = "qwen2"
    model_types = ("qwen2",)
    cls = "Qwen2ForCausalLM"
    head_key = False

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from _window(config)


class Qwen3(Decoder):
    """Norms of queries and keys in place of biases."""

    arch = "qwen3"
    model_types = ("qwen3",)
    cls = "Qwen3ForCausalLM"
    parts = _NORMED

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from _window(config)


class _Experts(Decoder):
    """Experts in every block."""

    def entries(self, config: Config) -> Iterator[Entry]:
        for entry in super().entries(config):
            if ".mlp." not in entry.parameter:
                yield entry
        for index in range(int(config["num_hidden_layers"])):
            yield router(index)
        # The library has had two names for it.
        number = config.get("num_experts") or config.get("num_local_experts")
        yield from experts(config, int(number or 0))

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from _window(config)
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            yield "some of its blocks have no experts, which llama.cpp does not expect"


class Qwen2Moe(_Experts):
    """Experts and one that all tokens share, behind a gate."""

    arch = "qwen2moe"
    model_types = ("qwen2_moe",)
    cls = "Qwen2MoeForCausalLM"
    head_key = False
    fields = (
        *Decoder.fields,
        Field("expert_count", "num_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
        Field("expert_feed_forward_length", "moe_intermediate_size", default="intermediate_size"),
        Field(
            "expert_shared_feed_forward_length",
            "shared_expert_intermediate_size",
            default="intermediate_size",
        ),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        yield from shared_expert(config)

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        # Files state no width of the experts of early models: the tensors do.
        for name, tensor in (
            ("moe_intermediate_size", "blk.0.ffn_gate_exps.weight"),
            ("shared_expert_intermediate_size", "blk.0.ffn_gate_shexp.weight"),
        ):
            if tensor in tensors and len(tensors[tensor].shape) > 1:
                config[name] = tensors[tensor].shape[-2]
        config["norm_topk_prob"] = False

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if config.get("norm_topk_prob"):
            yield "it norms the weights of the chosen experts, and llama.cpp does not for qwen2moe"


class Qwen3Moe(_Experts):
    """Experts, with the weights of the chosen ones normed."""

    arch = "qwen3moe"
    model_types = ("qwen3_moe",)
    cls = "Qwen3MoeForCausalLM"
    parts = _NORMED
    fields = (
        *Decoder.fields,
        Field("expert_count", "num_experts"),
        Field("expert_used_count", "num_experts_per_tok"),
        Field("expert_feed_forward_length", "moe_intermediate_size", default="intermediate_size"),
    )

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["norm_topk_prob"] = True

    def write(self, config: Config) -> dict[str, Any]:
        if "num_experts" not in config:  # The library's newer name.
            config = {**config, "num_experts": config.get("num_local_experts")}
        return super().write(config)

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if not config.get("norm_topk_prob"):
            yield "it does not norm the weights of the chosen experts, and llama.cpp does"
