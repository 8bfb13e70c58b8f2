"""Roles and layers guessed from the names that models give their modules."""

from __future__ import annotations

import pytest

from quantmill.targeting.roles import guess_layer, guess_role
from quantmill.targeting.types import ROLES


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lm_head", "head"),
        ("model.lm_head", "head"),
        ("embed_out", "head"),
        ("score", "head"),
        ("output", "head"),  # the original names of Llama
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("tok_embeddings", "embedding"),
        ("shared", "embedding"),
        ("model.layers.0.input_layernorm", "norm"),
        ("model.layers.0.self_attn.q_norm", "norm"),
        ("transformer.h.0.ln_1", "norm"),
        ("transformer.ln_f", "norm"),
        ("vision.encoder.layers.0.layer_norm2", "norm"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.0.attn.c_attn", "attention"),
        ("bert.encoder.layer.0.attention.output.dense", "attention"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attention"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "attention"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("bert.encoder.layer.0.output.dense", "mlp"),
        ("bert.encoder.layer.0.intermediate.dense", "mlp"),
        ("model.decoder.layers.0.fc1", "mlp"),
        ("model.layers.0.mlp.experts", "expert"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "expert"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.mlp.router", "router"),
        ("model.projector", None),
        ("lm_head_projection", None),
        ("attention_mask_proj", None),
    ],
)
def test_roles_by_name(name: str, role: str | None) -> None:
    assert guess_role(name, "") == role
    assert role is None or role in ROLES


def test_a_class_says_more_than_a_name() -> None:
    assert guess_role("model.layers.0.mlp.scale", "LlamaRMSNorm") == "norm"
    assert guess_role("model.layers.0.mlp.table", "Embedding") == "embedding"
    assert guess_role("model.layers.0.mlp.up_proj", "Linear") == "mlp"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.12", 12),
        ("transformer.h.3.attn", 3),
        ("bert.encoder.layer.4.output", 4),
        ("encoder.block.5.layer.0.SelfAttention.q", 5),
        ("blocks.6.mlp", 6),
        ("model.layers.7.mlp.experts.31.w1", 7),
        ("lm_head", None),
        ("model.players.1.x", None),
        ("model.layers.x", None),
        ("model.layers.1x", None),
        ("experts.3.w1", None),
    ],
)
def test_layers_by_name(name: str, layer: int | None) -> None:
    assert guess_layer(name) == layer
