"""GPT-2: learned positions, transposed linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Entry, Family, Field, Tensors
from quantmill_gguf.architectures.moves import Transposed

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["GPT2"]

_LINEARS = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


class GPT2(Family):
    """All of its linears are ``Conv1D``."""

    arch = "gpt2"
    model_types = ("gpt2",)
    cls = "GPT2LMHeadModel"
    layer_key = "n_layer"
    prefix = "transformer.h"
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }
    parts: ClassVar[Mapping[str, str]] = {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    fields = (
        Field("block_count", "n_layer"),
        Field("context_length", "n_positions"),
        Field("embedding_length", "n_embd"),
        Field("feed_forward_length", "n_inner"),
        Field("attention.head_count", "n_head"),
        Field("attention.layer_norm_epsilon", "layer_norm_epsilon", "real", 1e-5),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        for entry in super().entries(config):
            part, _, local = entry.tensor.removeprefix("blk.").partition(".")[2].rpartition(".")
            if part in _LINEARS and local == "weight":
                yield Entry(entry.parameter, entry.tensor, Transposed())
            else:
                yield entry

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        config["activation_function"] = "gelu_new"

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found.setdefault("feed_forward_length", 4 * config["n_embd"])
        return found

    def problems(self, config: Config) -> Iterator[str]:
        act = config.get("activation_function", "gelu_new")
        if act not in ("gelu_new", "gelu_pytorch_tanh"):
            yield f"its activation is {act}, and llama.cpp computes gelu_new"
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(name):
                yield f"{name} is on, which llama.cpp does not compute"
        if config.get("scale_attn_weights") is False:
            yield "its attention is not scaled, which llama.cpp does"
