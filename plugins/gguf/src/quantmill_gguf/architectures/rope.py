"""Rotary embeddings: the parameters of transformers and the keys and tables of llama.cpp.

Llama 3's scaling and LongRoPE are stored as tables of factors, one for each pair of dimensions.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = [
    "FREQUENCIES",
    "LONG",
    "SHORT",
    "factors_of",
    "parameters",
    "read_rope",
    "table_of",
    "write_rope",
]

FREQUENCIES: Final = "rope_freqs.weight"
LONG: Final = "rope_factors_long.weight"
SHORT: Final = "rope_factors_short.weight"
_ORIGINALS: Final = (8192, 4096, 2048, 16384, 32768)
_YARN: Final = {
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


def read_rope(keys: Keys, *, base: float = 10000.0, head_dim: int | None = None) -> dict[str, Any]:
    """``rope_parameters``; with ``head_dim`` the part of a head that is rotated is among them."""
    theta = keys.real("rope.freq_base", base)
    kind = keys.get("rope.scaling.type", "none")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if head_dim is not None:
        count = keys.whole("rope.dimension_count", head_dim)
        found["partial_rotary_factor"] = count / head_dim
    if FREQUENCIES in keys.tables:
        return found | _llama3(keys, table_of(keys, FREQUENCIES), theta)
    if kind in ("none", "", None):
        # Old files scale by a divisor alone.
        scale = keys.get("rope.scale_linear")
        return found if scale in (None, 1.0) else found | _linear(keys, "rope.scale_linear")
    if kind == "linear":
        return found | _linear(keys, "rope.scaling.factor")
    if kind == "yarn":
        found |= {
            "rope_type": "yarn",
            "factor": keys.real("rope.scaling.factor"),
            "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
        }
        for key, name in _YARN.items():
            if keys.get(key) is not None:
                found[name] = keys.real(key)
        return found
    if kind == "longrope" and LONG in keys.tables and SHORT in keys.tables:
        return found | {
            "rope_type": "longrope",
            "long_factor": table_of(keys, LONG),
            "short_factor": table_of(keys, SHORT),
            "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
            **(
                {"attention_factor": keys.real("rope.scaling.attn_factor")}
                if keys.get("rope.scaling.attn_factor") is not None
                else {}
            ),
        }
    raise keys.unsupported(
        f"its rotary embedding is scaled by {kind!r:.40}, which is not translated"
    )


def _linear(keys: Keys, key: str) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": keys.real(key)}


def table_of(keys: Keys, name: str) -> list[float]:
    """The values of a table: what frequencies are divided by."""
    raw = keys.tables[name]
    values = struct.unpack(f"<{len(raw) // 4}f", raw)
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise keys.unsupported(f"{name} holds factors that are not positive numbers")
    return [float(f"{value:.7g}") for value in values]


def factors_of(scaling: Mapping[str, Any], base: float, width: int) -> list[float]:
    """The factors of Llama 3's scaling: each wavelength's divisor, ``width / 2`` of them.

    Source: ``_compute_llama3_parameters`` of transformers.
    """
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    made = []
    for index in range(width // 2):
        length = 2 * math.pi * base ** (2 * index / width)
        if length < original / high:
            made.append(1.0)
        elif length > original / low:
            made.append(float(scaling["factor"]))
        else:
            smooth = (original / length - low) / (high - low)
            made.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return made


def _llama3(keys: Keys, factors: list[float], base: float) -> dict[str, Any]:
    """The scaling of Llama 3 that gave these factors: the file has what came out of it only."""
    stated = keys.get("rope.scaling.original_context_length")
    originals = (stated, *_ORIGINALS) if isinstance(stated, int) and stated > 0 else _ORIGINALS
    for original in originals:
        scaling = {
            "factor": round(max(factors, default=1.0), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        made = factors_of(scaling, base, 2 * len(factors))
        if all(abs(a - b) <= 1e-4 * b for a, b in zip(factors, made, strict=True)):
            return {"rope_type": "llama3", **scaling}
    raise keys.unsupported(f"{FREQUENCIES} holds factors that are not those of Llama 3's scaling")


def parameters(config: Mapping[str, Any], kind: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of a config, under today's names, also out of older configs."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get(kind, rope)
    if not rope:
        rope = dict(config.get("rope_scaling") or {})
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
        if config.get("rope_theta") is not None:
            rope["rope_theta"] = config["rope_theta"]
    found = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(name) is not None:
            found.setdefault(name, config[name])
    return found


def write_rope(
    config: Mapping[str, Any], width: int
) -> tuple[dict[str, Any], dict[str, list[float]], str]:
    """Metadata, tables, and what of it llama.cpp does not compute (empty if nothing).

    ``width`` counts the rotated dimensions of a head.
    """
    rope = parameters(config)
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    keys: dict[str, Any] = {"rope.freq_base": theta}
    if kind == "default":
        return keys, {}, ""
    if kind == "llama3":
        return keys, {FREQUENCIES: factors_of(rope, theta, width)}, ""
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        return keys, {}, ""
    stated = rope.get("original_max_position_embeddings")
    original = int(config["max_position_embeddings"] if stated is None else stated)
    keys["rope.scaling.original_context_length"] = original
    keys["rope.scaling.type"] = kind
    if kind == "yarn":
        keys["rope.scaling.factor"] = float(rope["factor"])
        for key, name in _YARN.items():
            if rope.get(name) is not None and key != "rope.scaling.attn_factor":
                keys[key] = float(rope[name])
        return keys, {}, ""
    if kind == "longrope":
        ratio = config["max_position_embeddings"] / original
        attention = rope.get("attention_factor")
        if attention is None:
            log = math.log(max(ratio, 1.0))
            attention = math.sqrt(1 + log / math.log(original))
        keys["rope.scaling.attn_factor"] = float(attention)
        tables = {LONG: list(rope["long_factor"]), SHORT: list(rope["short_factor"])}
        return keys, tables, ""
    return keys, {}, f"its rotary embedding is scaled by {kind!r}, which llama.cpp does not know"
