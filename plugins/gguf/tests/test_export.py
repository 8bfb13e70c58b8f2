"""Models into GGUF files and back: logits, names, what can't be written, splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.embedding import FormEmbedding
from quantmill.findings import QuantmillError
from quantmill.linear import FormLinear
from quantmill_gguf.container import GgufFile, open_split

transformers = pytest.importorskip("transformers")
pytest.importorskip("quantmill_transformers")

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_IDS,
}
_HEADS = {**_BASE, "head_dim": 32}
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
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {**_BASE, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": (
        "Llama",
        {
            **_BASE,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("Mistral", {**_HEADS, "sliding_window": None}),
    "qwen2-tied": ("Qwen2", {**_BASE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _HEADS),
    "gemma": ("Gemma", _HEADS),
    "gemma2": ("Gemma2", {**_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "Gemma3Text",
        {**_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3", _BASE),
    "phi3-long": ("Phi3", {**_BASE, "rope_parameters": _LONG}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS},
    ),
    "starcoder2": ("Starcoder2", _BASE),
    "falcon-7b": ("Falcon", {**_FALCON, "multi_query": True}),
    "falcon-40b": ("Falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "stablelm": ("StableLm", {**_BASE, "use_qkv_bias": True}),
    "stablelm-12b": ("StableLm", {**_BASE, "qk_layernorm": True, "use_parallel_residual": True}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_IDS}),
}
IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))


def make(name: str) -> Any:
    kind, options = MODELS[name]
    cls = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(
        kind, f"{kind}ForCausalLM"
    )
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, f"{kind}Config")(**options)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.1)
    return model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits.float()
    return found


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, tuple[Path, Tensor]] = {}

    def of(name: str) -> tuple[Path, Tensor]:
        if name not in made:
            path = tmp_path_factory.mktemp(name) / "hf"
            model = make(name)
            model.save_pretrained(path)
            made[name] = path, logits(model)
        return made[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_a_float_file_gives_the_same_logits(folder: Any, name: str, tmp_path: Path) -> None:
    source, wanted = folder(name)
    out = tmp_path / "f.gguf"
    quantmill.quantize(source, out, "gguf:type=F32")
    assert far(logits(quantmill.load(out, dtype="float32")), wanted) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma3", "gpt2", "falcon-40b", "bloom"])
def test_a_quantized_file_computes_packed(folder: Any, name: str, tmp_path: Path) -> None:
    source, wanted = folder(name)
    out = tmp_path / "q.gguf"
    report = quantmill.quantize(source, out, "gguf:type=Q8_0")
    packed: Any = quantmill.load(out, dtype="float32")
    assert far(logits(packed), wanted) < 0.3
    floats = quantmill.load(out, dtype="float32", dequantize=True)
    assert far(logits(packed), logits(floats)) < 1e-5
    assert isinstance(packed.get_input_embeddings(), FormEmbedding)
    kinds = {type(part) for part in packed.modules()}
    assert FormLinear in kinds and not {torch.nn.Linear, torch.nn.Embedding} & kinds - {
        torch.nn.Embedding
    }
    file = GgufFile.open(out)
    data = sum(item.nbytes for item in file.tensors.values())
    assert report.plan.totals["bytes_after"] == data and report.bytes == file.size


def test_a_split_is_read_as_one(folder: Any, tmp_path: Path) -> None:
    source, wanted = folder("qwen3")
    report = quantmill.quantize(
        source, tmp_path / "s.gguf", "gguf:type=F32", max_shard_bytes=100_000
    )
    assert len(report.files) > 2 and sorted(report.files) == sorted(
        path.name for path in tmp_path.iterdir()
    )
    first = tmp_path / min(report.files)
    assert sum(len(item.tensors) for item in open_split(first)) == 25
    assert far(logits(quantmill.load(first, dtype="float32")), wanted) < 1e-5


def test_what_the_user_keeps_stays_float(folder: Any, tmp_path: Path) -> None:
    source, _ = folder("qwen3")
    out = tmp_path / "k.gguf"
    quantmill.quantize(source, out, "gguf:type=Q8_0", skip=["role:attention"], dtype="float16")
    types = {name: item.type.name for name, item in GgufFile.open(out).tensors.items()}
    assert types["blk.0.attn_q.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def refused(source: Path, out: Path, **options: Any) -> set[str]:
    with pytest.raises(QuantmillError) as error:
        quantmill.quantize(source, out, options.pop("method", "gguf:type=Q8_0"), **options)
    assert not out.exists() and not [p for p in out.parent.iterdir() if ".part" in p.name]
    return {item.code for item in error.value.findings}


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    options = {**_BASE, "hidden_act": "relu"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    model.save_pretrained(tmp_path / "hf")
    assert "QM-GGUF-040" in refused(tmp_path / "hf", tmp_path / "x.gguf")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert "QM-GGUF-040" in refused(tmp_path / "hf", tmp_path / "x.gguf")


def test_other_methods_and_folders_are_refused(folder: Any, tmp_path: Path) -> None:
    source, _ = folder("qwen3")
    assert "QM-METHOD-001" in refused(source, tmp_path / "folder")
    existing = tmp_path / "there.gguf"
    existing.write_bytes(b"mine")
    with pytest.raises(QuantmillError, match="QM-DISK-002"):
        quantmill.quantize(source, existing, "gguf:type=Q8_0")
    assert existing.read_bytes() == b"mine"


def test_nothing_is_left_after_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    model = make("qwen3")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    assert refused(tmp_path / "hf", tmp_path / "x.gguf") == {"QM-WEIGHT-001"}
    assert refused(tmp_path / "hf", tmp_path / "x.gguf", non_finite="keep") == {"QM-GGUF-042"}


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "falcon-40b"])
def test_a_loaded_model_is_saved_with_the_same_bytes(
    folder: Any, name: str, tmp_path: Path
) -> None:
    source, _ = folder(name)
    first, again, direct = (tmp_path / f"{n}.gguf" for n in ("first", "again", "direct"))
    quantmill.quantize(source, first, "gguf-q4_0")
    quantmill.save(quantmill.load(first), again)
    quantmill.save(quantmill.load(source, "gguf-q4_0"), direct)
    one, *others = (GgufFile.open(path) for path in (first, again, direct))
    for other in others:
        assert one.tensors.keys() == other.tensors.keys()
        for key, tensor in one.tensors.items():
            there = other.tensors[key]
            assert tensor.type == there.type and tensor.shape == there.shape
            assert one.data[tensor.start : tensor.stop] == other.data[there.start : there.stop], key


def test_a_trained_norm_is_saved(folder: Any, tmp_path: Path) -> None:
    source, _ = folder("qwen3")
    model: Any = quantmill.load(source, "gguf-q8_0")
    model.model.norm.weight.data.fill_(3.0)
    quantmill.save(model, tmp_path / "t.gguf")
    back: Any = quantmill.load(tmp_path / "t.gguf", dtype="float32")
    assert torch.equal(back.model.norm.weight, torch.full((64,), 3.0))


def test_what_can_not_be_saved_is_refused(folder: Any, tmp_path: Path) -> None:
    source, _ = folder("qwen3")
    with pytest.raises(QuantmillError, match="QM-SAVE-001"):
        quantmill.save(make("qwen3"), tmp_path / "x.gguf")
    model = quantmill.load(source, "gguf-q8_0")
    with pytest.raises(QuantmillError, match="QM-SAVE-002"):
        quantmill.save(model, tmp_path / "x.bin")


def test_the_types_of_a_mix_are_those_of_llama_cpp(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        **{**_HEADS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "hf")
    quantmill.quantize(tmp_path / "hf", tmp_path / "m.gguf", "gguf-q4_k_m")
    file = GgufFile.open(tmp_path / "m.gguf")
    types = {name: item.type.name for name, item in file.tensors.items()}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.attn_v.weight"] == "Q4_K" and types["blk.3.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.attn_output.weight"] == "Q5_0" and types["output_norm.weight"] == "F32"
    assert file.metadata["general.file_type"] == 15
