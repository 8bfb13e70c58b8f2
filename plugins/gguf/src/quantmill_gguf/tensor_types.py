"""The type of every tensor of a file: a mix's choices, a user's overrides, and fallbacks.

The choices are those of llama.cpp's ``llama-quantize`` (``src/llama-quant.cpp``), so that a file
has the types that people expect under its name: the values and the down projections of the first
and last layers get more bits, the output head and the embedding have rules of their own, and rows
that don't fill a type's blocks fall back to a type of smaller blocks.

This module imports no PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from quantmill.config import suggestion
from quantmill.findings import Findings, QuantmillError
from quantmill.targeting.rules import decide
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Rule
from quantmill_gguf import codes
from quantmill_gguf.mixes import Mix, MixOptions, ModelFacts
from quantmill_gguf.types.sizes import BY_NAME, PLAIN

__all__ = ["choose", "fallback", "tensor_order"]


def tensor_order(name: str) -> tuple[int, str]:
    """Key of the order in which llama.cpp meets tensors: outside the blocks first."""
    match = re.match(r"blk\.(\d{1,9})\.", name, re.ASCII)
    return (int(match[1]) if match else -1, name)


def choose(
    mix: Mix,
    facts: ModelFacts,
    tensors: Iterable[tuple[str, tuple[int, ...], str]],
    options: MixOptions | None = None,
) -> dict[str, str]:
    """The type of every tensor.

    Args:
        mix: see :func:`~quantmill_gguf.mixes.mix_named`.
        facts: of the model.
        tensors: ``(name, shape, type)`` of all tensors under llama.cpp's names, the row length
            last in ``shape``; ``type`` is what a tensor keeps that is not quantized.

    Returns:
        Type names by tensor name, in llama.cpp's order (:func:`tensor_order`).

    Raises:
        QuantmillError: an override's pattern can't be read, matches nothing or disagrees with
            another one; a type is unknown.
    """
    options = options or MixOptions()
    ordered = sorted(tensors, key=lambda item: tensor_order(item[0]))
    wanted = _overridden(ordered, options, facts)
    for name in filter(None, (options.output, options.embedding)):
        _known_type(name, name)
    state = _State(mix, facts, options, [name for name, _, _ in ordered])
    found: dict[str, str] = {}
    for name, shape, kept in ordered:
        found[name] = kept
        if _is_quantized(name, shape, facts.architecture, options):
            found[name] = state.type_of(name, shape, wanted.get(name))
    return found


_NEVER: Final = (
    # Substrings of names of matrices that are small, or that are no matrices to multiply with.
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel"),
    *("per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight"),
    *("indexer.q_proj.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd"),
    *("sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook"),
    "mm.a.code_embd",
    *(
        f"time_mix_{part}.weight"
        for part in (
            *("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2"),
            *("decay_w1", "decay_w2", "lerp_fused"),
        )
    ),
)
_NEVER_BY_NAME: Final = ("position_embd.weight", "token_types.weight")
_NEVER_IN: Final = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight"),
        *("ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight"),
        "attn_v_b.weight",
    )
}


def _is_quantized(
    name: str, shape: tuple[int, ...], architecture: str, options: MixOptions
) -> bool:
    # A leading dimension of one is none to llama.cpp.
    if sum(1 for _ in _trimmed(shape)) < 2 or not name.endswith("weight"):
        return False
    if name in _NEVER_BY_NAME or (name == "output.weight" and options.keep_output):
        return False
    parts = (*_NEVER, *_NEVER_IN.get(architecture, ()))
    return not any(part in name for part in parts)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _known_type(name: str, where: str) -> None:
    if name not in BY_NAME:
        hint = suggestion(name.upper(), BY_NAME) or "see the types in the documentation"
        raise QuantmillError(codes.UNKNOWN_MIX(where, f"{name!r} is no type of ggml", hint))


_PARTS: Final = (
    ("attn_", "attention"),
    ("ssm_", "attention"),
    ("ffn_gate_inp", "router"),
    ("ffn_", "mlp"),
)


def _module(name: str, shape: tuple[int, ...]) -> ModuleInfo:
    """A tensor as targeting sees modules."""
    path = name.removesuffix(".weight")
    layer = tensor_order(name)[0]
    local = path.rpartition(".")[2]
    role = next((role for part, role in _PARTS if local.startswith(part)), None)
    if local.endswith("_exps"):
        role = "expert"
    if layer < 0:
        role = {"output": "head", "token_embd": "embedding"}.get(path, role)
    matrix = _trimmed(shape)[-2:]
    weight = ParameterInfo(name, matrix, "F32", (name,))
    return ModuleInfo(
        path, "linear", "Tensor", {"weight": weight}, role, layer if layer >= 0 else None
    )


def _overridden(
    tensors: Sequence[tuple[str, tuple[int, ...], str]], options: MixOptions, facts: ModelFacts
) -> dict[str, str]:
    """Types that the user's patterns give, by tensor name."""
    if not options.overrides:
        return {}
    rules = []
    for pattern, kind in options.overrides:
        _known_type(kind, pattern)
        rules.append(Rule(pattern, "configure", "user", options={"type": kind}))
    names, modules = [], []
    for name, shape, _ in tensors:
        if not _is_quantized(name, shape, facts.architecture, options):
            continue
        for module in (_module(name, shape), options.aliases.get(name)):
            if module is not None:
                names.append(name)
                modules.append(module)
    decisions, findings = decide(modules, rules, kinds=("linear", "conv1d", "embedding", "stacked"))
    Findings(findings).raise_errors()
    found: dict[str, str] = {}
    for name, decision in zip(names, decisions, strict=True):
        if decision.options is not None:
            found.setdefault(name, str(decision.options["type"]))
    return found


_CATEGORIES: Final = (
    # The first substring of a name that fits says what the tensor is for.
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attention output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((found for part, found in _CATEGORIES if part in name), "other")


_VALUES: Final = frozenset({"qkv", "kv_b", "v"})
_FALLBACK: Final = {
    **dict.fromkeys(("IQ4_XS",), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""For rows that don't fill blocks of 256, or 64."""


def fallback(kind: str, columns: int) -> str:
    """The type that rows of ``columns`` can have in place of ``kind``."""
    if columns % BY_NAME[kind].block == 0:
        return kind
    smaller = _FALLBACK.get(kind, kind)
    return smaller if columns % BY_NAME[smaller].block == 0 else "F16"


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between them."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


class _State:
    """Counts tensors as llama.cpp does: what a layer gets depends on how many came before."""

    def __init__(
        self, mix: Mix, facts: ModelFacts, options: MixOptions, names: Sequence[str]
    ) -> None:
        self.mix, self.facts, self.options = mix, facts, options
        categories = [_category(name) for name in names]
        self.values = sum(item in _VALUES for item in categories)
        self.tied = "output" not in categories
        self.seen = {"values": 0, "down": 0}

    def type_of(self, name: str, shape: tuple[int, ...], wanted: str | None) -> str:
        category, options = _category(name), self.options
        if category == "embedding" and options.embedding is not None:
            # The other table follows, unless a pattern names it.
            kind = options.embedding if name == "token_embd.weight" or wanted is None else wanted
            return fallback(kind, shape[-1])
        if category == "output" and options.output is not None:
            return fallback(options.output, shape[-1])
        kind = self.mix.base
        if wanted is not None:
            kind = wanted
        elif kind not in PLAIN and not options.pure:
            kind = self._mixed(name, shape, category)
        return fallback(kind, shape[-1])

    def _mixed(self, name: str, shape: tuple[int, ...], category: str) -> str:
        mix, base = self.mix.name, self.mix.base
        gently = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
        if self.facts.architecture == "glm5-next" and any(part in name for part in gently):
            return "Q8_0"
        if category == "output" or (self.tied and category == "embedding"):
            return self._head(shape)
        if mix == "MXFP4_MOE":
            experts = len(_trimmed(shape)) > 2
            if self.facts.architecture == "bailingmoe3":
                experts = experts and category in ("up", "gate", "down")
            return "MXFP4" if experts else "Q8_0"
        if category == "embedding":
            return "Q4_K" if mix in ("TQ1_0", "TQ2_0", "Q2_0") else base
        if category in _VALUES:
            index = self.seen["values"]
            self.seen["values"] += 1
            return self._values(index)
        if category == "k":
            return "Q8_0" if self.facts.experts == 8 else base
        if category == "down":
            index = self.seen["down"]
            self.seen["down"] += 1
            # Tensors of single experts come in any number and order: the name tells.
            layer = tensor_order(name)[0] if self.facts.experts > 1 else index
            return self._down(layer)
        if category == "attention output":
            return self._attention_output()
        return base

    def _head(self, shape: tuple[int, ...]) -> str:
        base = self.mix.base
        if self.options.output is not None:
            return self.options.output
        if self.mix.name == "MXFP4_MOE" or self.facts.architecture == "falcon":
            return "Q8_0"
        if shape[-1] % BY_NAME[base].block:
            return "Q8_0"
        return "Q8_0" if base == "Q8_0" else "Q6_K"

    def _values(self, index: int) -> str:
        mix, kind, shared = self.mix.name, self.mix.base, self.facts.sharing >= 4
        if mix == "Q2_K":
            kind = "Q4_K" if shared else "Q3_K"
        elif mix == "Q2_K_S" and shared:
            kind = "Q4_K"
        elif mix == "Q3_K_M":
            kind = "Q5_K" if index < 2 else "Q4_K"
        elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and shared):
            kind = "Q5_K"
        elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(index, self.values):
            kind = "Q6_K"
        elif mix == "Q4_K_S" and index < 4:
            kind = "Q5_K"
        if self.facts.is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if self.facts.experts == 8 else kind

    def _down(self, layer: int) -> str:
        mix, base, layers = self.mix.name, self.mix.base, self.facts.layers
        falcon, imatrix = self.facts.architecture == "falcon", self.options.importance
        early, more = layer < layers // 8, _more_bits(layer, layers)
        if mix == "Q2_K":
            return "Q3_K"
        if mix == "Q2_K_S":
            return "Q4_K" if early else base
        if mix == "Q3_K_M":
            if layer < layers // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or more else base
        if mix == "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        if mix == "Q4_K_M":
            if not falcon:
                return "Q6_K" if more else base
            return "Q6_K" if layer < layers // 16 else "Q5_K" if more else "Q4_K"
        if mix == "Q5_K_M":
            return "Q6_K" if more else base
        if early and mix in ("IQ4_NL", "IQ4_XS") and not imatrix:
            return "Q5_K"
        if early and mix == "Q4_K_S" and not falcon:
            return "Q5_K"
        if early and mix in ("Q4_0", "Q5_0") and imatrix:
            # Without a minimum, the first down projections may go wrong with an imatrix.
            return "Q4_1" if mix == "Q4_0" else "Q5_1"
        return base

    def _attention_output(self) -> str:
        mix, base = self.mix.name, self.mix.base
        if self.facts.architecture == "falcon":
            return "Q4_K" if mix == "Q3_K_L" else base
        if self.facts.experts == 8:
            eight = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
            return "Q5_K" if mix in eight else base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, base)
