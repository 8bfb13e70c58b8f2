"""Mamba: state spaces in place of attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Entry, Family, Field, Tensors
from quantmill_gguf.architectures.moves import MinusExp, Move, Squeezed

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Mamba"]


class Mamba(Family):
    """The first Mamba."""

    arch = "mamba"
    model_types = ("mamba",)
    cls = "MambaForCausalLM"
    prefix = "backbone.layers"
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "backbone.embeddings",
        "output_norm": "backbone.norm_f",
        "output": "lm_head",
    }
    parts: ClassVar[Mapping[str, str]] = {
        "attn_norm": "norm",
        "ssm_in": "mixer.in_proj",
        "ssm_conv1d": "mixer.conv1d",
        "ssm_x": "mixer.x_proj",
        "ssm_dt": "mixer.dt_proj",
        "ssm_out": "mixer.out_proj",
    }
    fields = (
        Field("block_count", "num_hidden_layers"),
        Field("embedding_length", "hidden_size"),
        Field("ssm.conv_kernel", "conv_kernel"),
        Field("ssm.inner_size", "intermediate_size"),
        Field("ssm.state_size", "state_size"),
        Field("ssm.time_step_rank", "time_step_rank"),
        Field("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", "real", 1e-5),
    )

    def moves(self, config: Config) -> Mapping[str, Move]:
        return {"ssm_conv1d": Squeezed(1, 3)}

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        for index in range(int(config["num_hidden_layers"])):
            mixer = f"{self.prefix}.{index}.mixer"
            yield Entry(f"{mixer}.A_log", f"blk.{index}.ssm_a", MinusExp())
            yield Entry(f"{mixer}.D", f"blk.{index}.ssm_d")

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        inner, width = config["intermediate_size"], config["hidden_size"]
        if inner % width:
            raise keys.refuse("ssm.inner_size", inner, f"a multiple of {width}")
        if keys.get("ssm.dt_b_c_rms"):
            raise keys.unsupported("it norms B, C and the time step, as Falcon Mamba does")
        config["expand"] = inner // width
        config["use_bias"] = "blk.0.ssm_in.bias" in tensors
        config["use_conv_bias"] = "blk.0.ssm_conv1d.bias" in tensors
        config["hidden_act"] = "silu"

    def write(self, config: Config) -> dict[str, Any]:
        # What has no meaning here and is read all the same has the values of llama.cpp's converter.
        return {
            **super().write(config),
            "context_length": 1 << 20,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.dt_b_c_rms": False,
            "vocab_size": config["vocab_size"],
        }

    def problems(self, config: Config) -> Iterator[str]:
        if config["intermediate_size"] != 2 * config["hidden_size"]:
            yield "its blocks are not twice as wide as the model, which llama.cpp expects"
        if config.get("use_bias") or not config.get("use_conv_bias", True):
            yield "llama.cpp expects a bias of the convolution, and none elsewhere"
        if config.get("hidden_act", "silu") != "silu":
            yield f"its activation is {config['hidden_act']}, and llama.cpp computes silu"
