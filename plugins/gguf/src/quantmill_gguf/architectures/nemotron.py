"""Nemotron: layer norms that add one to their weight, an MLP without a gate, squared ReLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import DECODER, Config, Field, Tensors
from quantmill_gguf.architectures.llama import Decoder
from quantmill_gguf.architectures.moves import PlusOne
from quantmill_gguf.architectures.rope import parameters, read_rope

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Nemotron"]


class Nemotron(Decoder):
    """Nemotron 3 and 4, and Minitron."""

    arch = "nemotron"
    model_types = ("nemotron",)
    cls = "NemotronForCausalLM"
    activation = "relu2"
    norms = PlusOne()
    needs_output = True
    parts: ClassVar[Mapping[str, str]] = {
        name: module for name, module in DECODER.items() if name != "ffn_gate"
    }
    fields = (
        *Decoder.fields[:-1],
        Field("attention.layer_norm_epsilon", "norm_eps", "real", 1e-5),
    )

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["rope_parameters"] = read_rope(keys, head_dim=config["head_dim"])
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors

    def rotated(self, config: Config) -> int:
        rope = parameters(config)
        return int(self.head_dim(config) * rope.get("partial_rotary_factor", 0.5))

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        heads = int(config["num_attention_heads"])
        if self.head_dim(config) * heads != config["hidden_size"]:
            yield "its heads are wider or narrower than the model, which llama.cpp does not expect"
