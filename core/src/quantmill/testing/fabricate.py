"""Small float checkpoints made on the spot, with the names and config of a Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "llama_config",
    "llama_shapes",
    "write_tiny_gpt2",
    "write_tiny_llama",
    "write_tiny_mixtral",
]


def llama_config(
    *,
    hidden: int = 64,
    inner: int = 128,
    layers: int = 2,
    vocab: int = 256,
    heads: int = 4,
    tied: bool = False,
    bias: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """A ``config.json`` that transformers accepts."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": bias,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": dtype,
    }


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint's tensors, in the order of the model."""
    hidden, inner, vocab = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        shapes |= {
            f"{base}.self_attn.q_proj.weight": (hidden, hidden),
            f"{base}.self_attn.k_proj.weight": (key, hidden),
            f"{base}.self_attn.v_proj.weight": (key, hidden),
            f"{base}.self_attn.o_proj.weight": (hidden, hidden),
            f"{base}.mlp.gate_proj.weight": (inner, hidden),
            f"{base}.mlp.up_proj.weight": (inner, hidden),
            f"{base}.mlp.down_proj.weight": (hidden, inner),
            f"{base}.input_layernorm.weight": (hidden,),
            f"{base}.post_attention_layernorm.weight": (hidden,),
        }
        if config.get("attention_bias"):
            shapes |= {
                f"{base}.self_attn.{part}_proj.bias": (size,)
                for part, size in (("q", hidden), ("k", key), ("v", key), ("o", hidden))
            }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    change: dict[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """Write a random Llama; ``change`` replaces tensors by name. Returns ``folder``."""
    config = llama_config(**options)
    dtype = getattr(torch, config["dtype"])
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in llama_shapes(config).items():
        if len(shape) == 1 and name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * 0.08).to(dtype)
    tensors |= change or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    step = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        part = names[index * step : (index + 1) * step]
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    return folder


def write_tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Write a random GPT-2, whose linears are ``Conv1D`` (stored ``[in, out]``) with biases."""
    width, vocab = 64, 256
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": vocab,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, width),
        "transformer.wpe.weight": (64, width),
    }
    for layer in range(2):
        base = f"transformer.h.{layer}"
        sizes = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }
        for name, size in sizes.items():
            shapes |= {f"{base}.{name}.weight": size, f"{base}.{name}.bias": size[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{base}.{name}.weight": (width,), f"{base}.{name}.bias": (width,)}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tiny_mixtral(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Mixtral of four experts, whose files have each expert's matrices apart."""
    config = {
        **llama_config(layers=1),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    shapes = {name: shape for name, shape in llama_shapes(config).items() if ".mlp." not in name}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    base = "model.layers.0.block_sparse_moe"
    shapes[f"{base}.gate.weight"] = (4, hidden)
    for expert in range(4):
        shapes |= {
            f"{base}.experts.{expert}.w1.weight": (inner, hidden),
            f"{base}.experts.{expert}.w2.weight": (hidden, inner),
            f"{base}.experts.{expert}.w3.weight": (inner, hidden),
        }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * 0.08).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
