"""T5 and UMT5: an encoder, and a decoder that looks at it; positions as biases of attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantmill_gguf.architectures.family import Config, Entry, Family, Field, Tensors

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["T5", "T5Encoder"]


class T5(Family):
    """Encoder and decoder.

    transformers scales what the head reads where the head is the embedding; llama.cpp does not,
    which orders tokens the same.
    """

    arch = "t5"
    model_types: ClassVar[tuple[str, ...]] = ("t5", "umt5")
    classes: ClassVar[Mapping[str, str]] = {
        "t5": "T5ForConditionalGeneration",
        "umt5": "UMT5ForConditionalGeneration",
    }
    cls = "T5ForConditionalGeneration"
    layer_key = "num_layers"
    sides: ClassVar[tuple[str, ...]] = ("enc", "dec")
    fields = (
        Field("block_count", "num_layers"),
        Field("context_length", "n_positions", default=512),
        Field("embedding_length", "d_model"),
        Field("feed_forward_length", "d_ff"),
        Field("attention.head_count", "num_heads"),
        Field("attention.key_length", "d_kv"),
        Field("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", "real", 1e-6),
        Field("attention.relative_buckets_count", "relative_attention_num_buckets"),
    )

    def class_of(self, config: Config) -> str:
        return self.classes[config["model_type"]]

    def entries(self, config: Config) -> Iterator[Entry]:
        yield Entry("shared.weight", "token_embd.weight")
        yield Entry("lm_head.weight", "output.weight")
        for side in self.sides:
            name = "encoder" if side == "enc" else "decoder"
            key = "num_layers" if side == "enc" else "num_decoder_layers"
            yield Entry(f"{name}.final_layer_norm.weight", f"{side}.output_norm.weight")
            for index in range(int(config.get(key) or config["num_layers"])):
                where = f"{name}.block.{index}.layer"
                yield from self._block(side, where, index, self.gated(config))

    @staticmethod
    def gated(config: Config) -> bool:
        """Whether the MLP has a gate."""
        return str(config.get("feed_forward_proj", "relu")).startswith("gated-")

    def _block(self, side: str, name: str, index: int, gated: bool) -> Iterator[Entry]:
        block = f"{side}.blk.{index}"
        kinds = {"attn": "SelfAttention"}
        if side == "dec":
            kinds["cross_attn"] = "EncDecAttention"
        for number, (kind, module) in enumerate(kinds.items()):
            for letter in "qkvo":
                yield Entry(
                    f"{name}.{number}.{module}.{letter}.weight", f"{block}.{kind}_{letter}.weight"
                )
            yield Entry(f"{name}.{number}.layer_norm.weight", f"{block}.{kind}_norm.weight")
        bias = f"{name}.0.SelfAttention.relative_attention_bias.weight"
        yield Entry(bias, f"{block}.attn_rel_b.weight")
        last = len(kinds)
        yield Entry(f"{name}.{last}.layer_norm.weight", f"{block}.ffn_norm.weight")
        parts = {"up": "wi", "down": "wo"}
        if gated:
            parts = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        for part, module in parts.items():
            yield Entry(
                f"{name}.{last}.DenseReluDense.{module}.weight", f"{block}.ffn_{part}.weight"
            )

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        gated = any(name.endswith(".ffn_gate.weight") for name in tensors)
        config["feed_forward_proj"] = "gated-gelu" if gated else "relu"
        name = str(keys.metadata.get("general.name", "")).lower()
        if "enc.blk.1.attn_rel_b.weight" in tensors or "umt5" in name:
            config["model_type"] = "umt5"  # It has positions in every layer.
        config["num_decoder_layers"] = keys.whole("decoder_block_count", config["num_layers"])
        if config["num_decoder_layers"] > len(tensors):
            raise keys.refuse("decoder_block_count", config["num_decoder_layers"], "fewer blocks")
        start = keys.get("decoder_start_token_id", config.get("pad_token_id") or 0)
        config["decoder_start_token_id"] = start if isinstance(start, int) else 0
        config["is_encoder_decoder"] = True

    def write(self, config: Config) -> dict[str, Any]:
        found = super().write(config)
        found["attention.value_length"] = config["d_kv"]
        found["attention.layer_norm_epsilon"] = found["attention.layer_norm_rms_epsilon"]
        found["vocab_size"] = config["vocab_size"]
        if "dec" in self.sides:
            layers = config.get("num_decoder_layers")
            found["decoder_block_count"] = layers or config["num_layers"]
            start = config.get("decoder_start_token_id")
            found["decoder_start_token_id"] = start if start is not None else config["pad_token_id"]
        return found

    def needs_head(self, config: Config) -> bool:
        # A head that is the embedding is taken for one that is scaled.
        return config.get("scale_decoder_outputs") is False and "dec" in self.sides

    def problems(self, config: Config) -> Iterator[str]:
        act = config.get("feed_forward_proj", "relu")
        if act not in ("relu", "gated-gelu"):
            yield f"its MLP is {act}, and llama.cpp computes relu or gated-gelu"
        blocks = config["num_layers"]
        if "dec" in self.sides and (config.get("num_decoder_layers") or blocks) > blocks:
            yield "its decoder has more blocks than its encoder, which llama.cpp can't load"
        if config.get("relative_attention_max_distance", 128) != 128:
            yield "its positions reach further than 128 tokens, or less far, and llama.cpp's do so"


class T5Encoder(T5):
    """The encoder alone."""

    arch = "t5encoder"
    model_types = ("t5", "umt5")
    cls = "T5EncoderModel"
    classes: ClassVar[Mapping[str, str]] = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
    sides = ("enc",)

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        super().complete(config, keys, tensors)
        config["is_encoder_decoder"] = False
