"""What a model needs while it works, beyond its weights: estimates from a plan and a config.

Weights are exact, from the plan. The rest follows from the architecture's sizes:

- the key-value cache: keys and values of every layer and token, in the activations' dtype; layers
  with a sliding window keep no more than it;
- activations: what one block holds at once for all tokens of the context, and the logits;
- training: adapters in float32 with their gradients and two moments of Adam (16 bytes a
  parameter), the hidden states between blocks that gradient checkpointing keeps, and what the
  backward pass of one block, with the inputs of its adapters in float32, and of the loss need.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from quantmill.planning import ModulePlan, Plan

__all__ = ["Needs", "Sizes", "cache_bytes", "needs"]

_ADAPTER_BYTES: Final = 16
"""float32: weight, gradient and Adam's two moments."""
_ADAPTER_INPUT: Final = 4
"""float32: the input of an adapter, which its gradient needs."""
_HIDDEN_HELD: Final = 6
"""Tensors of the width of the hidden states that a block holds: residual, norm, attention."""
_INNER_HELD: Final = 3
"""Those of the width of the MLP: its two halves and their product."""
_LOSS_HELD: Final = 3
"""Logits in float32, their softmax and gradient."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes in a model's config; zero for what it does not say."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    cached: int
    """Values of keys and values that a layer keeps for a token."""
    window: int
    """Tokens that a layer with a sliding window keeps; zero for all."""
    windowed: int
    """Layers with a sliding window."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """From a ``config.json``; that of the language model where several are nested."""
        nested = config.get("text_config")
        if isinstance(nested, Mapping):
            config = {**config, **nested}

        def first(*names: str) -> int:
            for name in names:
                value = config.get(name)
                if isinstance(value, int) and value > 0:
                    return value
            return 0

        hidden = first("hidden_size", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_head", "num_heads")
        layers = first("num_hidden_layers", "n_layer", "num_layers")
        width = first("head_dim") or hidden // max(1, heads)
        cached = 2 * (first("num_key_value_heads") or heads) * width
        if first("kv_lora_rank"):
            # Multi-head latent attention is cached expanded, keys with their rotary part.
            keys = first("qk_nope_head_dim") + first("qk_rope_head_dim")
            cached = heads * (keys + first("v_head_dim"))
        window = first("sliding_window")
        kinds = config.get("layer_types")
        windowed = 0
        if window and isinstance(kinds, list | tuple):
            windowed = sum(kind == "sliding_attention" for kind in kinds)
        elif window and config.get("use_sliding_window", True):
            windowed = layers
        if isinstance(kinds, list | tuple):
            layers = min(layers, sum("attention" in str(kind) for kind in kinds) or layers)
        inner = first("intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
        return cls(layers, hidden, inner, first("vocab_size"), cached, window, windowed)


def cache_bytes(config: Mapping[str, Any], context: int, itemsize: int = 2) -> int:
    """Key-value cache of one sequence of ``context`` tokens."""
    sizes = Sizes.of(config)
    tokens = (sizes.layers - sizes.windowed) * context
    tokens += sizes.windowed * min(context, sizes.window or context)
    return tokens * sizes.cached * itemsize


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes by what they are for."""

    weights: int
    loading: int
    """At the peak of loading, weights included."""
    cache: int
    """Key-value cache."""
    working: int
    """Activations, logits, and weights that are dequantized on their way."""
    adapters: int
    """Trainable parameters with gradients and optimizer; zero for inference."""

    @property
    def running(self) -> int:
        """While it computes."""
        return self.weights + self.cache + self.working + self.adapters

    @property
    def peak(self) -> int:
        """The larger of loading and running."""
        return max(self.loading, self.running)

    def to_dict(self) -> dict[str, int]:
        """JSON-able data."""
        return {**dataclasses.asdict(self), "running": self.running, "peak": self.peak}


def needs(
    plan: Plan, config: Mapping[str, Any], *, context: int, training: bool = False, rank: int = 16
) -> Needs:
    """What a planned model needs for one sequence of ``context`` tokens.

    ``training`` is that of adapters of ``rank`` on every quantized linear (or, in a float model,
    every linear that could be), with gradient checkpointing.
    """
    import torch

    sizes, totals = Sizes.of(config), plan.totals
    itemsize = int(getattr(torch, plan.dtype).itemsize)
    forward = max((item.forward_bytes for item in plan.modules), default=0)
    block = context * (_HIDDEN_HELD * sizes.hidden + _INNER_HELD * sizes.inner) * itemsize
    block += context * max((item.row_bytes for item in plan.modules), default=0)
    if not training:
        # Only the last token's logits are computed when a text is continued.
        working = block + forward + sizes.vocabulary * (itemsize + 4)
        cache = cache_bytes(config, context, itemsize)
        return Needs(totals["bytes_memory"], totals["peak_bytes"], cache, working, 0)
    quantized = [item for item in plan.modules if item.action == "quantize"]
    linears = [item for item in quantized if item.kind != "embedding"] or [
        item
        for item in plan.modules
        if item.kind in ("linear", "conv1d") and item.action != "not-a-target"
    ]
    ends = [
        (item.target.out_features, item.target.in_features)
        if item.target is not None
        else (item.shape[0], item.shape[-1])
        for item in linears
    ]
    experts = [1 if item.target is None else item.target.experts or 1 for item in linears]
    adapters = rank * sum(n * sum(pair) for n, pair in zip(experts, ends, strict=True))
    adapters *= _ADAPTER_BYTES
    kept = context * sizes.hidden * itemsize * sizes.layers
    loss = context * sizes.vocabulary * (itemsize + 4 * _LOSS_HELD)
    # A quantized head computes with the loss, after all blocks: its own weight, or the embedding's.
    heads = [item for item in quantized if item.kind == "embedding" or _is_head(item)]
    loss += max((item.backward_bytes for item in heads), default=0)
    # The backward pass holds a block's activations, the gradients of half of them, which adapters
    # give in float32, and a float weight. Blocks and experts are alike: what differs in a number
    # only is the same linear.
    gradients = context * (_HIDDEN_HELD * sizes.hidden + _INNER_HELD * sizes.inner) * 4 // 2
    weight = max((item.backward_bytes for item in linears if not _is_head(item)), default=0)
    alike = [re.sub(r"\.\d+(?=\.)", "", item.name) for item in linears]
    widths = {name: width for name, (_, width) in zip(alike, ends, strict=True)}
    adapted = context * sum(widths.values()) * _ADAPTER_INPUT if itemsize != _ADAPTER_INPUT else 0
    working = kept + max(loss, block + gradients + adapted + max(weight, forward))
    return Needs(totals["bytes_memory"], totals["peak_bytes"], 0, working, adapters)


def _is_head(item: ModulePlan) -> bool:
    return item.target is not None and item.target.module.role == "head"
