"""Models into GGUF files and back: logits, names, what can't be written, splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.embedding import FormEmbedding
from quantmill.findings import QuantmillError
from quantmill.linear import FormLinear
from quantmill_gguf.architectures.moves import Squeezed
from quantmill_gguf.container import GgufFile, open_split
from quantmill_gguf.models import TABLES
from quantmill_gguf.requantize import requantize
from quantmill_gguf.tiny import BASE, HEADS, MODELS, far, logits, make

transformers = pytest.importorskip("transformers")
pytest.importorskip("quantmill_transformers")


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


PACKED = [
    *["llama", "qwen2-tied", "gpt2", "falcon-40b", "mixtral", "qwen2-moe", "qwen3.5"],
    *["gpt-oss", "lfm2", "mamba", "flan-t5", "gemma4"],
]


@pytest.mark.parametrize("name", PACKED)
def test_a_quantized_file_computes_packed(folder: Any, name: str, tmp_path: Path) -> None:
    source, wanted = folder(name)
    out = tmp_path / "q.gguf"
    report = quantmill.quantize(source, out, "gguf-q8_0")
    packed: Any = quantmill.load(out, dtype="float32")
    assert far(logits(packed), wanted) < 0.3
    floats = quantmill.load(out, dtype="float32", dequantize=True)
    assert far(logits(packed), logits(floats)) < 1e-5
    assert isinstance(packed.get_input_embeddings(), FormEmbedding)
    assert any(isinstance(part, FormLinear) for part in packed.modules())
    # One row (a gate), rows narrower than a block, what llama.cpp keeps, a head declared tied.
    kept = ("lm_head", "model.per_layer_model_projection")
    for module, part in packed.named_modules():
        small = type(part) is torch.nn.Linear and (part.out_features == 1 or part.in_features % 32)
        assert type(part) is not torch.nn.Linear or small or module in kept, module
    file = GgufFile.open(out)
    data = sum(item.nbytes for item in file.tensors.values())
    tables = sum(item.nbytes for name, item in file.tensors.items() if name in TABLES)
    assert report.plan.totals["bytes_after"] == data - tables and report.bytes == file.size


def test_a_head_beside_an_embedding_is_its_own_though_both_are_quantized(
    folder: Any, tmp_path: Path
) -> None:
    source, wanted = folder("flan-t5")
    quantmill.quantize(source, tmp_path / "f.gguf", "gguf:type=F32")
    requantize(tmp_path / "f.gguf", tmp_path / "q.gguf", "Q8_0")
    file = GgufFile.open(tmp_path / "q.gguf")
    assert {file.tensors[f"{name}.weight"].type.name for name in ("token_embd", "output")} == {
        "Q8_0"
    }
    model: Any = quantmill.load(tmp_path / "q.gguf", dtype="float32")
    assert isinstance(model.lm_head, FormLinear) and isinstance(model.shared, FormEmbedding)
    assert far(logits(model), wanted) < 0.1


@pytest.mark.parametrize("shape", [(64,), (1, 64)])
def test_a_gate_is_a_vector_or_a_row_in_a_file(shape: tuple[int, ...]) -> None:
    move, values = Squeezed(0, 2), torch.randn(shape)
    assert move.shape(shape) == tuple(move.read(values).shape) == (1, 64)
    assert torch.equal(move.write(move.read(values)), values.reshape(64))


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


def test_a_file_without_a_tokenizer_says_so(folder: Any, tmp_path: Path) -> None:
    """llama.cpp loads one that names no vocabulary, and none that is silent about it."""
    source, _ = folder("qwen3")
    first, again = tmp_path / "first.gguf", tmp_path / "again.gguf"
    report = quantmill.quantize(source, first, "gguf-q4_0")
    assert "QM-GGUF-043" in {item.code for item in report.plan.findings}
    quantmill.save(quantmill.load(first), again)
    for path in (first, again):
        metadata = GgufFile.open(path).metadata
        assert metadata["tokenizer.ggml.model"] == "none" and metadata["qwen3.vocab_size"] == 96
        with pytest.raises(QuantmillError, match="QM-ARCH-010"):
            quantmill.load_tokenizer(path)


def test_a_tokenizer_of_a_kind_that_llama_cpp_has_not_is_left_out(
    folder: Any, tmp_path: Path
) -> None:
    source, path = tmp_path / "qwen3", tmp_path / "model.gguf"
    shutil.copytree(folder("qwen3")[0], source)
    table = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": table}))
    report = quantmill.quantize(source, path, "gguf-q8_0")
    (said,) = [item for item in report.plan.findings if item.code == "QM-GGUF-043"]
    assert "'WordLevel'" in said.cause and "no vocabulary" in said.cause
    assert GgufFile.open(path).metadata["tokenizer.ggml.model"] == "none"


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
    options = {**BASE, "hidden_act": "relu"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    model.save_pretrained(tmp_path / "hf")
    assert "QM-GGUF-040" in refused(tmp_path / "hf", tmp_path / "x.gguf")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert "QM-GGUF-040" in refused(tmp_path / "hf", tmp_path / "x.gguf")


def test_a_lattice_type_is_refused_with_what_to_take(folder: Any, tmp_path: Path) -> None:
    source, _ = folder("qwen3")
    with pytest.raises(QuantmillError, match="read, and not written") as caught:
        quantmill.quantize(source, tmp_path / "x.gguf", "gguf-iq2_xxs")
    assert "gguf-q2_k" in caught.value.findings[0].fix


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
        **{**HEADS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "hf")
    quantmill.quantize(tmp_path / "hf", tmp_path / "m.gguf", "gguf-q4_k_m")
    file = GgufFile.open(tmp_path / "m.gguf")
    types = {name: item.type.name for name, item in file.tensors.items()}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.attn_v.weight"] == "Q4_K" and types["blk.3.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.attn_output.weight"] == "Q5_0" and types["output_norm.weight"] == "F32"
    assert file.metadata["general.file_type"] == 15
