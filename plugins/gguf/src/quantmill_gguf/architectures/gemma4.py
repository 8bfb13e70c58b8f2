"""Gemma 4: heads of two widths, keys that layers share, an embedding for every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from quantmill_gguf.architectures.family import Config, Entry, Family, Field, Tensors
from quantmill_gguf.architectures.gemma import PARTS, Gemma
from quantmill_gguf.architectures.moves import Move
from quantmill_gguf.architectures.rope import FREQUENCIES, parameters, table_of

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys

__all__ = ["Gemma4"]

_STILL: Final = 1e30
"""llama.cpp divides the frequency of a dimension that is not rotated by this."""
_CAP: Final = 30.0
"""What llama.cpp caps logits at where a file does not say."""
_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


class Gemma4(Gemma):
    """The text model, dense; norms are as they are, unlike those of earlier Gemmas."""

    arch = "gemma4"
    model_types = ("gemma4_text",)
    cls = "Gemma4ForCausalLM"
    norms = Move()
    top: ClassVar[Mapping[str, str]] = {
        **Gemma.top,
        "per_layer_token_embd": "model.embed_tokens_per_layer",
        "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm",
    }
    parts: ClassVar[Mapping[str, str]] = {
        **PARTS,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
    }
    fields = (
        *(
            item
            for item in Gemma.fields
            if item.name not in ("num_key_value_heads", "intermediate_size")
        ),
        Field("attention.sliding_window", "sliding_window", default=512),
    )

    def entries(self, config: Config) -> Iterator[Entry]:
        yield from super().entries(config)
        for index in range(int(config["num_hidden_layers"])):
            scale = f"model.layers.{index}.layer_scalar"
            yield Entry(scale, f"blk.{index}.layer_output_scale.weight")

    # -- from a file ---------------------------------------------------------------------------

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        count = config["num_hidden_layers"]
        if keys.get("expert_count"):
            raise keys.unsupported("it has experts, and those of Gemma 4 are not translated")
        windows = keys.flags("attention.sliding_window_pattern", count)
        if windows is None:
            windows = [bool((index + 1) % 6) for index in range(count)]
        config["layer_types"] = [_SLIDING if item else _FULL for item in windows]
        full = keys.whole("attention.key_length")
        config["head_dim"] = keys.whole("attention.key_length_swa", full)
        config["global_head_dim"] = full
        heads = keys.wholes("attention.head_count_kv", count)
        of_kind = {
            kind: {
                number
                for number, item in zip(heads, config["layer_types"], strict=True)
                if item == kind
            }
            for kind in (_SLIDING, _FULL)
        }
        if any(len(found) > 1 or 0 in found for found in of_kind.values()):
            raise keys.refuse("attention.head_count_kv", heads, "one number for layers of a kind")
        sliding = next(iter(of_kind[_SLIDING] or of_kind[_FULL]))
        config["num_key_value_heads"] = sliding
        last = [f"blk.{i}.attn_v.weight" for i, item in enumerate(windows) if not item]
        config["attention_k_eq_v"] = bool(last) and last[0] not in tensors
        if of_kind[_FULL] - {sliding}:
            config["num_global_key_value_heads"] = next(iter(of_kind[_FULL]))
            if not config["attention_k_eq_v"]:
                raise keys.unsupported("its layers have other numbers of keys, and values too")
        shared = keys.get("attention.shared_kv_layers")
        config["num_kv_shared_layers"] = keys.whole("attention.shared_kv_layers") if shared else 0
        widths = keys.wholes("feed_forward_length", count)
        config["intermediate_size"] = widths[0]
        config["use_double_wide_mlp"] = widths[-1] == 2 * widths[0]
        per_layer = keys.get("embedding_length_per_layer_input")
        config["hidden_size_per_layer_input"] = (
            keys.whole("embedding_length_per_layer_input") if per_layer else 0
        )
        table = tensors.get("per_layer_token_embd.weight")
        config["vocab_size_per_layer_input"] = (
            table.shape[0] if table is not None and len(table.shape) == 2 else config["vocab_size"]
        )
        capped = keys.get("final_logit_softcapping", _CAP)
        config["final_logit_softcapping"] = (
            keys.real("final_logit_softcapping", _CAP) if capped else None
        )
        config["hidden_activation"] = self.activation
        config["rope_parameters"] = self._rope(keys)

    @staticmethod
    def _rope(keys: Keys) -> dict[str, Any]:
        local = keys.real("rope.freq_base_swa", 10000.0)
        whole: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": keys.real("rope.freq_base", 1000000.0),
        }
        if FREQUENCIES in keys.tables:
            table = table_of(keys, FREQUENCIES)
            moved = [item for item in table if item == 1.0]
            if table[: len(moved)] != moved or not all(
                item >= _STILL / 2 for item in table[len(moved) :]
            ):
                raise keys.unsupported(f"{FREQUENCIES} holds factors that are not Gemma 4's")
            whole["rope_type"] = "proportional"
            whole["partial_rotary_factor"] = len(moved) / len(table)
        return {_FULL: whole, _SLIDING: {"rope_type": "default", "rope_theta": local}}

    # -- to a file -----------------------------------------------------------------------------

    @staticmethod
    def layers(config: Config, name: str, default: Any) -> Any:
        """What full layers have of their own."""
        of_layers = config.get("per_layer_config") or {}
        for index, kind in enumerate(config["layer_types"]):
            own = of_layers.get(str(index)) or of_layers.get(index) or {}
            if kind == _FULL and own.get(name) is not None:
                return own[name]
        return default

    def rotated(self, config: Config) -> int:
        return int(self.layers(config, "head_dim", config["head_dim"]))

    def _factors(self, config: Config) -> list[float]:
        rope = parameters(config, _FULL)
        half = self.rotated(config) // 2
        part = rope.get("partial_rotary_factor", 1.0)
        moved = int(half * part) if rope["rope_type"] == "proportional" else half
        return [1.0] * moved + [_STILL] * (half - moved)

    def extra(self, config: Config) -> Mapping[str, list[float]]:
        return {FREQUENCIES: self._factors(config)}

    def write(self, config: Config) -> dict[str, Any]:
        found = Family.write(self, config)
        kinds = list(config["layer_types"])
        full, local = self.rotated(config), int(config["head_dim"])
        windows = [kind == _SLIDING for kind in kinds]
        own = self.layers(config, "num_key_value_heads", config["num_key_value_heads"])
        found["attention.head_count_kv"] = [
            config["num_key_value_heads"] if item else own for item in windows
        ]
        shared = int(config.get("num_kv_shared_layers") or 0)
        width = config["intermediate_size"]
        wide = 2 if config.get("use_double_wide_mlp") else 1
        found["feed_forward_length"] = [
            width * (wide if index >= len(kinds) - shared else 1) for index in range(len(kinds))
        ]
        found |= {
            "attention.key_length": full,
            "attention.value_length": full,
            "attention.key_length_swa": local,
            "attention.value_length_swa": local,
            "attention.sliding_window_pattern": windows,
            "attention.shared_kv_layers": shared,
            "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
            "rope.dimension_count": full,
            "rope.dimension_count_swa": local,
            "rope.freq_base": float(parameters(config, _FULL)["rope_theta"]),
            "rope.freq_base_swa": float(parameters(config, _SLIDING)["rope_theta"]),
            "vocab_size": config["vocab_size"],
        }
        found["final_logit_softcapping"] = float(config.get("final_logit_softcapping") or 0.0)
        return found

    def problems(self, config: Config) -> Iterator[str]:
        if config.get("enable_moe_block"):
            yield "it has experts, and those of Gemma 4 are not translated"
        act = config.get("hidden_activation")
        if act not in (None, self.activation):
            yield f"its activation is {act}, and llama.cpp computes {self.activation}"
        if config.get("attention_bias"):
            yield "its attention has biases, which llama.cpp does not add"
        if config.get("use_bidirectional_attention") == "all":
            yield "its tokens see those behind them, which llama.cpp does not compute"
        shared = int(config.get("num_kv_shared_layers") or 0)
        own = list(config["layer_types"])[: len(config["layer_types"]) - shared]
        if shared and own[-2:] != [_SLIDING, _FULL]:
            yield "the layers whose keys others share are not the last two, one of each kind"
        if _FULL not in config["layer_types"]:
            yield "none of its layers sees all tokens, and llama.cpp expects that one does"
        rope = parameters(config, _FULL)
        if rope["rope_type"] not in ("default", "proportional"):
            yield f"its rotary embedding is {rope['rope_type']}, which llama.cpp does not know"
        if config.get("vocab_size_per_layer_input") != config["vocab_size"] and config.get(
            "hidden_size_per_layer_input"
        ):
            yield "the embedding for every layer has another vocabulary than the model"
