"""GGUF files of every architecture that transformers reads from GGUF: its own loader beside ours.

Its loader dequantizes, and loses or refuses what :data:`WRONG` says; llama.cpp, which computes the
same as we do from those files, is run by ``benchmarks/interop_llamacpp.py models``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("quantmill_transformers")
tiny = pytest.importorskip("quantmill_gguf.tiny")

pytestmark = pytest.mark.interop

RIGHT = [
    *["llama-plain", "mistral", "qwen2-tied", "phi3", "phi3-long", "gpt2-long", "starcoder2"],
    *["falcon-7b", "stablelm", "bloom", "minimax-m2", "lfm2", "mamba", "qwen3.5", "qwen3.5-moe"],
]
WRONG = {
    "llama": "biases of the MLP are dropped",
    "llama-yarn": "the scaling of the rotary embedding is dropped",
    "mixtral": "is read as a dense Llama",
    "qwen2-moe": "the widths of experts are not read",
    "qwen3": "the width of a head is not read",
    "qwen3-moe": "the widths of experts are not read",
    "gemma": "is refused",
    "gemma2": "the scale of queries is not read",
    "gemma3": "windows and the scale of queries are not read",
    "gemma4": "widths by layer are refused",
    "gemma4-keys": "widths by layer are refused",
    "gpt2": "the number of positions is not read",
    "falcon-40b": "is read as the older decoder",
    "stablelm-12b": "norms of heads are dropped",
    "nemotron": "biases of the MLP are dropped",
    "gpt-oss": "the scaling of the rotary embedding can't be read",
    "t5": "is read with a gate",
    "flan-t5": "is activated by ReLU",
    "umt5": "is activated by ReLU",
    "t5-encoder": "is read with a gate",
}
CHANGED = {
    "llama-plain": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "gpt2-long": ("gpt2", {"n_positions": 1024}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_transformers_makes_the_same_of_our_file(name: str, tmp_path: Path) -> None:
    base, options = CHANGED.get(name, (name, {}))
    tiny.save(tiny.make(base, **options), tmp_path / "hf")
    quantmill.quantize(tmp_path / "hf", tmp_path / "q.gguf", "gguf-q8_0")
    ours: Any = quantmill.load(tmp_path / "q.gguf", dtype="float32")
    cls = getattr(transformers, tiny.MODELS[base][0])
    theirs = cls.from_pretrained(tmp_path, gguf_file="q.gguf", dtype=torch.float32).eval()
    assert tiny.far(tiny.logits(ours), tiny.logits(theirs)) < 2e-5


def test_no_architecture_is_forgotten() -> None:
    from quantmill_gguf.architectures import FAMILIES

    assert {CHANGED.get(name, (name, {}))[0] for name in RIGHT} | set(WRONG) == set(tiny.MODELS)
    made = {item.cls for item in FAMILIES} | {"MistralForCausalLM", "MixtralForCausalLM"}
    assert made | {"UMT5ForConditionalGeneration"} == {cls for cls, _, _ in tiny.MODELS.values()}
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    names = {item.arch for item in FAMILIES}
    ours = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
    ours |= {"minimax_m2": "minimax-m2", "umt5": "t5", "mistral": "llama"}
    theirs = {ours.get(name, name) for name in {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS}}
    # A model of Deci's needs code from its checkpoint, which neither of us runs.
    assert theirs - {"general", "tokenizer", "deci"} <= names
