"""Small random models of many architectures, written by transformers itself.

Shipped, so that a backend is held to architectures and not only to a Llama: tied and fused
weights, ``Conv1D``, biases, stacked experts, encoders with decoders, buffers, vision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantmill_transformers.experts import find_experts

__all__ = ["MODELS", "SmallModel", "linears", "make", "sample", "write"]

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_WIDE = {**_TEXT, "num_key_value_heads": 2}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class SmallModel:
    """A class of transformers with a config that makes it small."""

    cls: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "text"
    """What it takes: ``text``, ``pair`` (encoder and decoder), ``image``, ``encoder``, ``audio``
    (and a decoder's text) or ``image-text``."""

    @property
    def generates(self) -> bool:
        """Whether ``generate`` makes sense for it."""
        return self.kind in ("text", "pair")


MODELS: Mapping[str, SmallModel] = {
    "llama": SmallModel("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama-tied": SmallModel(
        "LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}
    ),
    "mistral": SmallModel("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": SmallModel("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": SmallModel(
        "Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "tie_word_embeddings": True}
    ),
    "gemma2": SmallModel("Gemma2ForCausalLM", "Gemma2Config", _GROUPED),
    "gemma3": SmallModel("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED),
    "phi3": SmallModel("Phi3ForCausalLM", "Phi3Config", _WIDE),
    "gpt2": SmallModel(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 96,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "opt": SmallModel(
        "OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}
    ),
    "gpt-neox": SmallModel("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "falcon": SmallModel(
        "FalconForCausalLM", "FalconConfig", {**_TEXT, "num_kv_heads": 2, "bias": True}
    ),
    "mixtral": SmallModel(
        "MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}
    ),
    "qwen2-moe": SmallModel(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "qwen3-moe": SmallModel(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gpt-oss": SmallModel(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek-v3": SmallModel(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "bloom": SmallModel(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 2},
    ),
    "stablelm": SmallModel("StableLmForCausalLM", "StableLmConfig", _WIDE),
    "t5": SmallModel(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 96,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        "pair",
    ),
    "bart": SmallModel(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 96,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": 1,
            "pad_token_id": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        "pair",
    ),
    "bert": SmallModel("BertForMaskedLM", "BertConfig", _TEXT, "encoder"),
    "bert-classifier": SmallModel("BertForSequenceClassification", "BertConfig", _TEXT, "encoder"),
    "vit": SmallModel(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        "image",
    ),
    "resnet": SmallModel(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
        "image",
    ),
    "whisper": SmallModel(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 96,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        "audio",
    ),
    "llava": SmallModel(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_GROUPED},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
                "projection_dim": 64,
            },
            "image_token_index": 95,
            "image_seq_length": 4,
        },
        "image-text",
    ),
}
"""By name; each has two layers of width 64."""


def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model in memory. Biases, norms and buffers are random too, so that a tensor that
    was not loaded is seen in the output."""
    small = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, small.config)(**{**small.options, **changes})
    model = getattr(transformers, small.cls)(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *_stored_buffers(model)]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 0.1 * noise.abs() + 1 if tensor.ndim == 1 else 0.1 * noise
    return model.to(dtype).eval()


def _stored_buffers(model: nn.Module) -> list[Tensor]:
    stored = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in stored]


def write(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    save: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a small model with ``save_pretrained``; ``changes`` go to its config."""
    make(name, dtype=dtype, seed=seed, **changes).save_pretrained(folder, **(save or {}))
    return folder


def sample(name: str, model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for a model of :data:`MODELS`."""
    generator = torch.Generator().manual_seed(seed)
    kind = MODELS[name].kind
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(model.dtype)}
    if kind == "audio":
        features = torch.randn(2, 8, 32, generator=generator).to(model.dtype)
        return {
            "input_features": features,
            "decoder_input_ids": torch.randint(3, 96, (2, 5), generator=generator),
        }
    ids = torch.randint(3, 95, (2, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "pair":
        inputs["decoder_input_ids"] = torch.randint(3, 96, (2, 5), generator=generator)
    if kind == "image-text":
        ids[:, 1:5] = 95  # The places of an image of four patches.
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator).to(model.dtype)
    return inputs


def linears(model: nn.Module, *, where: Callable[[str], bool] = lambda name: True) -> set[str]:
    """Names of the plain linears (and ``Conv1D``) of a float model, and of the matrices of its
    experts: what a method may take."""
    plain = {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, transformers.pytorch_utils.Conv1D)
    }
    return {name for name in plain | find_experts(model).named.keys() if where(name)}
