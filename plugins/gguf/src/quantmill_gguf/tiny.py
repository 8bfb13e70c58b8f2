"""Tiny random models of every architecture that a GGUF file can hold, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["BASE", "HEADS", "IDS", "MODELS", "far", "logits", "make", "save"]

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_IDS,
}
HEADS = {**BASE, "head_dim": 32}
_FEW = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_FALCON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_IDS,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + i / 2 for i in range(8)],
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 32,
}
_T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_DELTA = {
    **HEADS,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
_GEMMA4 = {
    **BASE,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 6,
    "sliding_window": 16,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "Llama", {**BASE, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": (
        "LlamaForCausalLM",
        "Llama",
        {
            **BASE,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", "Mistral", {**HEADS, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", "Mixtral", {**BASE, **_FEW, "sliding_window": None}),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2", {**BASE, "tie_word_embeddings": True}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2Moe",
        {**BASE, **_FEW, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", HEADS),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3Moe",
        {**HEADS, **_FEW, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5Text", _DELTA),
    "qwen3.5-moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeText",
        {**_DELTA, **_FEW, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "gemma": ("GemmaForCausalLM", "Gemma", HEADS),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2",
        {**HEADS, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3Text",
        {**HEADS, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4Text",
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4-keys": (
        "Gemma4ForCausalLM",
        "Gemma4Text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3", BASE),
    "phi3-long": ("Phi3ForCausalLM", "Phi3", {**BASE, "rope_parameters": _LONG}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2", BASE),
    "falcon-7b": ("FalconForCausalLM", "Falcon", {**_FALCON, "multi_query": True}),
    "falcon-40b": (
        "FalconForCausalLM",
        "Falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "stablelm": ("StableLmForCausalLM", "StableLm", {**BASE, "use_qkv_bias": True}),
    "stablelm-12b": (
        "StableLmForCausalLM",
        "StableLm",
        {**BASE, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "bloom": (
        "BloomForCausalLM",
        "Bloom",
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_IDS},
    ),
    "nemotron": ("NemotronForCausalLM", "Nemotron", {**BASE, "mlp_bias": True}),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOss",
        {
            **HEADS,
            **_FEW,
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2",
        {
            **HEADS,
            **_FEW,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2",
        {**BASE, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "mamba": (
        "MambaForCausalLM",
        "Mamba",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **_IDS},
    ),
    "t5": ("T5ForConditionalGeneration", "T5", _T5),
    "flan-t5": (
        "T5ForConditionalGeneration",
        "T5",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "umt5": (
        "UMT5ForConditionalGeneration",
        "UMT5",
        {**_T5, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"},
    ),
    "t5-encoder": ("T5EncoderModel", "T5", _T5),
}
"""Class, prefix of the config's class, and options of the config."""
IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))


def make(name: str, **more: Any) -> Any:
    """The model, with weights that matter."""
    import transformers

    cls, config, options = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{config}Config")(**{**options, **more})
    model = getattr(transformers, cls)(made).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.1)
    if name == "flan-t5":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    for local, buffer in model.named_buffers():
        if local.endswith(("layer_scalar", "correction_bias")):
            buffer.data.normal_(1, 0.1)
    return model


def save(model: Any, folder: Path) -> None:
    """A checkpoint of the model with a tokenizer of as many tokens: single bytes, by GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: model.config.vocab_size - 3]
    tokens = {text: index for index, text in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pad, bos, eos = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=pad
    )
    fast.save_pretrained(folder)


def logits(model: Any) -> Tensor:
    """What it says of :data:`IDS`: logits, or the states of an encoder."""
    more = {"decoder_input_ids": IDS[:, :12]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found = model(input_ids=IDS, **more)
        values: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return values.float()


def far(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance."""
    return float((ours - theirs).norm() / theirs.norm())
