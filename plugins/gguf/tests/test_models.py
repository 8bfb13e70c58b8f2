"""GGUF files as models: logits, packed linears, inspection, what can't be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.embedding import FormEmbedding
from quantmill.findings import QuantmillError
from quantmill.linear import FormLinear
from quantmill_gguf.models import describe
from quantmill_gguf.reader import read
from quantmill_gguf.testing import matrices, write
from quantmill_gguf.types import TYPES
from quantmill_gguf.types.sizes import PLAIN
from quantmill_gguf.writer import GgufWriter, TensorSpec

DATA = Path(__file__).parent / "data"
FILE = DATA / "tiny-Q4_K_M.gguf"
TOKENS = torch.tensor([json.loads((DATA / "tokens.json").read_text())["token_ids"]])


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=TOKENS).logits[0, -16:].float()
    return found


@pytest.mark.parametrize("name", ["tiny-Q4_K_M", "tiny-IQ2_XXS-imatrix"])
def test_logits_of_a_file_of_llama_cpp_match_tightly(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    expected: Any = np.load(DATA / f"expected_{name}.npz")
    model: Any = quantmill.load(DATA / f"{name}.gguf")
    assert far(logits(model), torch.from_numpy(expected["logits_dequant"])) < 2e-6


def test_a_loaded_file_holds_the_bytes_that_lie_in_it() -> None:
    pytest.importorskip("quantmill_transformers")
    model: Any = quantmill.load(FILE)
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, FormLinear) and isinstance(model.lm_head, FormLinear)
    assert isinstance(model.model.embed_tokens, FormEmbedding)
    state = model.state_dict()
    headers = read(FILE)
    with headers.source.reader(headers) as reader:  # type: ignore[attr-defined]
        for name in headers.tensors:
            assert torch.equal(state[name], reader.tensor(name)), name


def test_dequantizing_gives_the_same_model() -> None:
    pytest.importorskip("quantmill_transformers")
    expected: Any = np.load(DATA / "expected_tiny-Q4_K_M.npz")
    model: Any = quantmill.load(FILE, dequantize=True, dtype="float32")
    assert type(model.lm_head) is torch.nn.Linear
    assert far(logits(model), torch.from_numpy(expected["logits_dequant"])) < 2e-5


def test_inspection_shows_metadata_types_and_bits() -> None:
    found = quantmill.inspect(FILE)
    assert not found.findings.errors and found.quantization is not None
    assert found.quantization["types"] == {"F32": 5, "Q4_K": 13, "Q6_K": 3}
    assert 4.5 < found.quantization["bits_per_weight"] < 5.5
    assert found.quantization["general.name"] == "Tiny Gguf Hf"
    assert found.quantization["tokenizer.ggml.tokens"] == "[320 values]"


def test_an_unknown_architecture_is_inspected_and_not_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", matrices())
    found = quantmill.inspect(path)
    assert len(found.tensors) == len(TYPES)
    assert "QM-GGUF-020" in {item.code for item in read(path).findings}
    with pytest.raises(QuantmillError):
        quantmill.load(path)


PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def in_file(name: str) -> str:
    module, _, local = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{PARTS[part]}.{local}"
    return f"{PARTS[module]}.{local}"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of Q or K as llama.cpp's converter orders them."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def export(model: Any, path: Path, arch: str, kind: str, **more: Any) -> Path:
    """A float model as a GGUF file, its matrices of type ``kind``."""
    config = model.config
    metadata = {
        "general.architecture": arch,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
    }
    found: list[tuple[TensorSpec, Tensor]] = []
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        renamed, work = in_file(name), tensor.float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            work = interleaved(work, heads[part])
        chosen = kind if tensor.ndim == 2 else "F32"
        raw = TYPES[chosen].quantize(work if work.ndim == 2 else work.unsqueeze(0))
        assert raw is not None
        found.append((TensorSpec(renamed, chosen, tuple(tensor.shape)), raw))
    for name, tensor in more.items():
        spec = TensorSpec(name.replace("__", "."), "F32", tuple(tensor.shape))
        found.append((spec, tensor.contiguous().view(torch.uint8)))
    with GgufWriter(path, metadata, [spec for spec, _ in found]) as writer:
        for _, raw in found:
            writer.write(raw)
    return path


def tiny(kind: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        **options,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0 if parameter.ndim > 1 else 1, 0.1)
    return model


@pytest.mark.parametrize(
    ("kind", "arch", "options"),
    [
        ("Llama", "llama", {}),
        ("Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", "llama", {"tie_word_embeddings": True}),
        ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", "qwen3", {}),
    ],
)
def test_exported_models_come_back(tmp_path: Path, kind: str, arch: str, options: Any) -> None:
    pytest.importorskip("quantmill_transformers")
    model = tiny(kind, **options)
    if "Qwen2" in kind:
        model.config.head_dim = 16
    exact: Any = quantmill.load(export(model, tmp_path / "f.gguf", arch, "F32"), dtype="float32")
    assert far(logits(exact), logits(model)) < 1e-5
    # The same values in the model and in the file: what differs is how they are computed with.
    path = export(model, tmp_path / "q.gguf", arch, "Q5_1")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            raw = TYPES["Q5_1"].quantize(parameter.data)
            assert raw is not None
            parameter.data.copy_(TYPES["Q5_1"].decode(raw))
    packed: Any = quantmill.load(path, dtype="float32")
    assert isinstance(packed.model.layers[1].self_attn.k_proj, FormLinear)
    assert far(logits(packed), logits(model)) < 2e-5


def test_the_scaling_of_llama_3_is_recognised(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny("Llama", rope_parameters=scaling, max_position_embeddings=16384)
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).float()
    path = export(model, tmp_path / "x.gguf", "llama", "F32", rope_freqs__weight=factors)
    assert read(path).config["rope_parameters"] == scaling
    loaded: Any = quantmill.load(path, dtype="float32")
    assert far(logits(loaded), logits(model)) < 1e-5
    path = export(model, tmp_path / "y.gguf", "llama", "F32", rope_freqs__weight=factors + 0.5)
    with pytest.raises(QuantmillError, match="QM-GGUF-023"):
        read(path)


@pytest.mark.parametrize(
    ("key", "value", "number"),
    [
        ("llama.embedding_length", None, "021"),
        ("llama.embedding_length", -1, "022"),
        ("llama.attention.head_count", "four", "022"),
        ("llama.rope.freq_base", float("nan"), "022"),
        ("llama.attention.head_count", 3, "024"),
        ("llama.rope.scaling.type", "yarn", "021"),
        ("llama.rope.scaling.type", "spun", "023"),
        ("llama.expert_count", 8, "021"),
    ],
)
def test_metadata_that_can_not_be_right_is_named(key: str, value: Any, number: str) -> None:
    from quantmill_gguf.container import GgufFile

    file = GgufFile.open(FILE)
    metadata = {**file.metadata, key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(QuantmillError, match=f"QM-GGUF-{number}"):
        describe(metadata, file.tensors, "x.gguf")


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    model = tiny("Llama")
    model.config.intermediate_size = 128
    with pytest.raises(QuantmillError, match="QM-GGUF-024"):
        quantmill.load(export(model, tmp_path / "x.gguf", "llama", "Q4_0"))


def test_every_block_type_is_a_suffix_of_the_codec() -> None:
    from quantmill_gguf.codec import GgufCodec

    assert {f"weight.{name}" for name in TYPES if name not in PLAIN} <= set(GgufCodec.suffixes)


def test_inspection_of_a_float_file_shows_its_metadata(tmp_path: Path) -> None:
    from quantmill_gguf.testing import METADATA

    path = write(tmp_path / "x.gguf", {})
    found = quantmill.inspect(path)
    assert found.kind == "gguf" and found.metadata["general.name"] == METADATA["general.name"]
    assert not quantmill.inspect(FILE).findings


def changed(tmp_path: Path, name: str, spec: TensorSpec | None) -> Path:
    """The file with one tensor of another shape, or without it."""
    from quantmill_gguf.container import GgufFile

    file = GgufFile.open(FILE)
    found = []
    for key, item in file.tensors.items():
        raw = torch.frombuffer(bytearray(file.data[item.start : item.stop]), dtype=torch.uint8)
        if key != name:
            found.append((TensorSpec(key, item.type.name, item.shape), raw))
        elif spec is not None:
            found.append((spec, torch.zeros(spec.nbytes, dtype=torch.uint8)))
    path = tmp_path / "changed.gguf"
    metadata = {k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.")}
    with GgufWriter(path, metadata, [item for item, _ in found], kinds=file.kinds) as writer:
        for _, raw in found:
            writer.write(raw)
    return path


@pytest.mark.parametrize(
    ("name", "spec", "code"),
    [
        ("blk.1.ffn_up.weight", None, "QM-ARCH-004"),
        ("blk.1.ffn_norm.weight", None, "QM-ARCH-004"),
        ("blk.0.ffn_up.weight", TensorSpec("blk.0.ffn_up.weight", "Q4_K", (7, 256)), "QM-GGUF-024"),
        ("blk.0.attn_q.weight", TensorSpec("blk.0.attn_q.weight", "Q4_K", (7, 256)), "QM-GGUF-024"),
        ("output_norm.weight", TensorSpec("output_norm.weight", "F32", (3,)), "QM-ARCH-003"),
        ("token_embd.weight", TensorSpec("token_embd.weight", "Q6_K", (9, 256)), "QM-"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, name: str, spec: TensorSpec | None, code: str
) -> None:
    pytest.importorskip("quantmill_transformers")
    with pytest.raises(QuantmillError, match=code):
        quantmill.load(changed(tmp_path, name, spec))


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    path = changed(tmp_path, "", None)
    quantmill.inspect(path)
    with pytest.raises(QuantmillError, match="QM-ARCH-010"):
        quantmill.load_tokenizer(path)
