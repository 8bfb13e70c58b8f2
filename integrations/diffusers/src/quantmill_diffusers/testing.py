"""Small random components and pipelines, written by diffusers itself.

Shipped, so that a backend is held to denoisers and not only to language models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

__all__ = ["COMPONENTS", "PIPELINES", "make", "sample", "write", "write_pipeline"]

COMPONENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "unet": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 1000,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 64,
            "ffn_dim": 128,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
    ),
    "vae": (
        "AutoencoderKL",
        {
            "block_out_channels": (32, 64),
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 4,
            "norm_num_groups": 8,
            "sample_size": 16,
        },
    ),
}
"""Class and config by name."""

PIPELINES = ("stable-diffusion", "dit")


def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random component in memory."""
    cls, config = COMPONENTS[name]
    torch.manual_seed(seed)
    model = getattr(diffusers, cls)(**config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise.abs() + 1 if parameter.ndim == 1 else noise
    return model.to(dtype).eval()


def write(name: str, folder: Path, **options: Any) -> Path:
    """Write a component with ``save_pretrained``."""
    save = options.pop("save", {})
    make(name, **options).save_pretrained(folder, **save)
    return folder


def sample(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments for a component's forward."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if name == "vae":
        return {"sample": noise(1, 3, 16, 16)}
    if name == "flux":
        return {
            "hidden_states": noise(1, 16, 4),
            "encoder_hidden_states": noise(1, 6, 32),
            "pooled_projections": noise(1, 32),
            "timestep": torch.tensor([1.0]).to(dtype),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        }
    if name == "wan":
        return {
            "hidden_states": noise(1, 4, 2, 8, 8),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": noise(1, 6, 32),
        }
    if name == "dit":
        return {
            "hidden_states": noise(1, 4, 8, 8),
            "timestep": torch.tensor([3]),
            "class_labels": torch.tensor([1]),
        }
    return {
        "sample": noise(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": noise(1, 6, 32),
    }


def write_pipeline(name: str, folder: Path) -> Path:
    """Write one of :data:`PIPELINES` with ``save_pretrained``."""
    if name == "dit":
        pipeline: Any = diffusers.DiTPipeline(
            make("dit"), make("vae"), diffusers.DDIMScheduler(), {0: "cat", 1: "dog"}
        )
    else:
        encoder, tokenizer = _text(folder.parent / f"{folder.name}-tokenizer")
        pipeline = diffusers.StableDiffusionPipeline(
            vae=make("vae"),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=make("unet"),
            scheduler=diffusers.DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def _text(folder: Path) -> tuple[Any, Any]:
    """A text encoder of transformers with a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 16
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval(), tokenizer
