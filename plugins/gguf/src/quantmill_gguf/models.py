"""What a GGUF file's names and metadata are called by transformers: tensors, config, row order.

Source: the tensor names of llama.cpp (``gguf-py/gguf/constants.py``) and its converter, which
reorders the rows of Q and K of the Llama family for its rotary embedding.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantmill.findings import Finding, QuantmillError
from quantmill_gguf import codes
from quantmill_gguf.container import Array, GgufTensor

__all__ = ["KNOWN", "Family", "HfModel", "describe"]

_TOP: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME: Final = re.compile(r"(?:blk\.(\d{1,9})\.)?(\w+)\.(weight|bias)", re.ASCII)
_ROPE: Final = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture of llama.cpp is called by transformers."""

    model_type: str
    cls: str
    permuted: bool = False
    """Rows of Q and K are interleaved for llama.cpp's rotary embedding."""


KNOWN: Final[dict[str, Family]] = {
    "llama": Family("llama", "LlamaForCausalLM", True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
}
"""Architectures that can be loaded."""


@dataclass(slots=True)
class HfModel:
    """A file's tensors under their names in transformers, and the config."""

    config: dict[str, Any]
    names: dict[str, str]
    """Name in the file to name in transformers; the same where the architecture is unknown."""
    heads: dict[str, int]
    """Name in the file to the number of heads whose rows are interleaved."""
    findings: list[Finding]


class _Keys:
    """Metadata of one architecture, read with checks."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, file: str) -> None:
        self.metadata, self.prefix, self.file = metadata, prefix, file

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}", default)

    def _refuse(self, key: str, value: Any, wanted: str) -> QuantmillError:
        name = f"{self.prefix}.{key}"
        if value is None:
            return QuantmillError(
                codes.MISSING_KEY(
                    self.file, f"it lacks {name}", "convert the model with a current llama.cpp"
                )
            )
        return QuantmillError(
            codes.BAD_VALUE(self.file, f"{name} is {value!r:.60}, not {wanted}", "correct it")
        )

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self._refuse(key, value, "a positive number below 2**31")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._refuse(key, value, "a positive number")
        # Stored as float32: the shortest decimal that is the same number there.
        return float(f"{value:.7g}")


def describe(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    file: str,
    rope: bytes | None = None,
) -> HfModel:
    """Names and config of a file.

    Args:
        metadata: of the first file.
        tensors: of all files.
        file: name of the file, for messages.
        rope: the little-endian float32 bytes of ``rope_freqs.weight``, where there is one.

    Raises:
        QuantmillError: the architecture is known, and its metadata is not what it must be.
    """
    name = metadata.get("general.architecture")
    family = KNOWN.get(name) if isinstance(name, str) else None
    if family is None:
        cause = f"general.architecture is {name!r:.60}; known are {', '.join(sorted(KNOWN))}"
        fix = "it can be inspected, not loaded; load the model's folder in place of the file"
        same = {item: item for item in tensors}
        return HfModel({}, same, {}, [codes.UNKNOWN_ARCHITECTURE(file, cause, fix)])
    assert isinstance(name, str)
    keys = _Keys(metadata, name, file)
    config = _config(keys, family, tensors, rope)
    names: dict[str, str] = {}
    heads: dict[str, int] = {}
    for item in tensors:
        renamed = _renamed(item)
        if item == _ROPE:
            continue  # It became a part of the config.
        names[item] = renamed or item
        match = _NAME.fullmatch(item)
        part = match[2] if match is not None and match[1] is not None else ""
        if family.permuted and part in ("attn_q", "attn_k"):
            key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            heads[item] = config[key]
            shape = tensors[item].shape
            plain = len(shape) == 2 or (len(shape) == 1 and bool(tensors[item].type.plain))
            if not plain or shape[0] == 0 or shape[0] % (2 * config[key]):
                cause = f"{item} is {list(shape)}, which {config[key]} heads don't divide evenly"
                raise QuantmillError(codes.BAD_VALUE(file, cause, "get the file again"))
    if len(set(names.values())) != len(names):
        raise QuantmillError(
            codes.DUPLICATE(file, "two tensors stand for the same parameter", "get it again")
        )
    return HfModel(config, names, heads, [])


def _renamed(name: str) -> str | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, part, local = match.groups()
    known = (_TOP if layer is None else _BLOCK).get(part)
    if known is None:
        return None
    prefix = "" if layer is None else f"model.layers.{int(layer)}."
    return f"{prefix}{known}.{local}"


def _config(
    keys: _Keys, family: Family, tensors: Mapping[str, GgufTensor], rope: bytes | None
) -> dict[str, Any]:
    if keys.get("expert_count"):
        raise QuantmillError(
            codes.UNSUPPORTED(
                keys.file,
                f"it has {keys.get('expert_count')!r:.20} experts, which are not stacked yet",
                "load the model's folder in place of the file",
            )
        )
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    embedding = tensors.get("token_embd.weight")
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None
    count = len(tokens) if isinstance(tokens, Array) else None
    vocabulary = rows or keys.whole("vocab_size", count)
    config: dict[str, Any] = {
        "architectures": [family.cls],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": keys.whole("attention.key_length", max(1, hidden // heads)),
        "hidden_act": "silu",
        "max_position_embeddings": keys.whole("context_length", 2048),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": _rope(keys, rope),
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
    }
    # llama.cpp computes in float32 around its matrix products.
    stored = {item.type.name for item in tensors.values() if len(item.shape) > 1}
    config["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(
        next(iter(stored)) if len(stored) == 1 else "", "float32"
    )
    if family.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    for name in ("bos", "eos", "padding"):
        token = keys.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < vocabulary:
            config[f"{name.replace('padding', 'pad')}_token_id"] = token
    return config


def _rope(keys: _Keys, factors: bytes | None) -> dict[str, Any]:
    base = keys.real("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type", "none")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if factors is not None:
        return {**found, **_llama3(keys, factors, base)}
    if kind == "linear":
        return {**found, "rope_type": "linear", "factor": keys.real("rope.scaling.factor")}
    if kind not in ("none", "", None):
        raise QuantmillError(
            codes.UNSUPPORTED(
                keys.file,
                f"its rotary embedding is scaled by {kind!r:.40}, which is not translated yet",
                "load the model's folder in place of the file",
            )
        )
    return found


def _llama3(keys: _Keys, raw: bytes, base: float) -> dict[str, Any]:
    """The scaling of Llama 3 that gave these factors: the file has what came out of it only."""
    count = len(raw) // 4
    factors = struct.unpack(f"<{count}f", raw[: 4 * count])
    width = 2 * count
    for original in (8192, 4096, 2048, 16384, 32768):
        scaling = {
            "factor": round(max(factors), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        made = []
        for index in range(count):
            length = 2 * math.pi * base ** (2 * index / width)
            low, high = original / 1.0, original / 4.0
            if length < high:
                made.append(1.0)
            elif length > low:
                made.append(scaling["factor"])
            else:
                smooth = (original / length - 1.0) / 3.0
                made.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
        if all(abs(a - b) <= 1e-4 * b for a, b in zip(factors, made, strict=True)):
            return {
                "rope_type": "llama3",
                **scaling,
                "original_max_position_embeddings": original,
            }
    raise QuantmillError(
        codes.UNSUPPORTED(
            keys.file,
            f"{_ROPE} holds factors that are not those of Llama 3's scaling",
            "load the model's folder in place of the file",
        )
    )


def shown(value: Any) -> Any:
    """A metadata value as JSON-able data that fits a line: long arrays as their length."""
    if isinstance(value, Array):
        return list(value) if len(value) <= 8 else f"[{len(value)} values]"
    if isinstance(value, str) and len(value) > 120:
        return value[:117] + "..."
    return value
