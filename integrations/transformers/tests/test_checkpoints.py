"""Checkpoints as they are found: old names, stacked experts, shards, ties, and broken ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill_transformers.testing import MODELS, make, sample, write

Small = Callable[[str], Path]


def rewrite(
    folder: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Change the tensors and the config of a checkpoint on the disk."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def renamed(*rules: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            found[name] = tensor
        return found

    return change


def equal(name: str, folder: Path) -> Any:
    """Our weights are theirs to the bit, and nothing is left to say about it."""
    theirs = getattr(transformers, MODELS[name].cls).from_pretrained(folder)
    ours: Any = quantmill.load(folder)
    state, again = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(again)
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor), key
    with torch.inference_mode():
        one, two = (model(**sample(name, model)).logits for model in (ours, theirs))
    # Not to the bit: the order of a product's sums depends on where its operands lie in memory.
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    return ours


def findings(folder: Path, method: Any = "bnb-nf4") -> dict[str, str]:
    pytest.importorskip("quantmill_bnb")
    return {item.where: item.code for item in quantmill.plan(folder, method).findings}


def refused(folder: Path, **options: Any) -> dict[str, str]:
    """``load`` refuses, with a cause and a fix for each place."""
    with pytest.raises(QuantmillError) as caught:
        quantmill.load(folder, **options)
    assert all(item.cause and item.fix for item in caught.value.findings)
    return {item.where: item.code for item in caught.value.findings}


# -- names of older versions -----------------------------------------------------------------------

VIT = (
    (r"vit\.layers\.", "vit.encoder.layer."),
    (r"attention\.([qkv])_proj", r"attention.attention.\1"),
    (r"attention\.q\b", "attention.query"),
    (r"attention\.k\b", "attention.key"),
    (r"attention\.v\b", "attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
OLD: Mapping[str, tuple[str, tuple[tuple[str, str], ...], str]] = {
    "gamma and beta": (
        "bert",
        ((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")),
        "bert.encoder.layer.0.output.LayerNorm.gamma",
    ),
    "no prefix of the base model": ("gpt2", ((r"^transformer\.", ""),), "h.0.attn.c_attn.weight"),
    "another head": ("gpt-neox", ((r"^lm_head", "embed_out"),), "embed_out.weight"),
    "another tree": ("vit", VIT, "vit.encoder.layer.0.attention.attention.query.weight"),
}


def old(case: str, folder: Path) -> Path:
    """A checkpoint as an older version wrote it; version 5 itself saves some so."""
    name, rules, there = OLD[case]
    rewrite(write(name, folder), renamed(*rules))
    assert there in load_file(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", sorted(OLD))
def test_old_names_are_read_and_saved_again(case: str, tmp_path: Path) -> None:
    folder = old(case, tmp_path / "old")
    ours = equal(OLD[case][0], folder)
    ours.save_pretrained(tmp_path / "saved")
    equal(OLD[case][0], tmp_path / "saved")


@pytest.mark.parametrize("case", sorted(OLD))
def test_old_names_are_quantized_and_read_again(case: str, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    folder = old(case, tmp_path / "old")
    plan = quantmill.plan(folder, "bnb-nf4")
    skipped = next(item.name for item in plan.modules if item.action == "quantize")
    ours: Any = quantmill.load(folder, "bnb-nf4", skip=[skipped])
    ours.save_pretrained(tmp_path / "saved")
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4", skip=[skipped])
    for written in ("saved", "out"):
        again = quantmill.load(tmp_path / written).state_dict()
        assert ours.state_dict().keys() == again.keys()
        for key, tensor in ours.state_dict().items():
            assert torch.equal(tensor, again[key]), (written, key)
        config = json.loads((tmp_path / written / "config.json").read_text())
        assert skipped in config["quantization_config"]["llm_int8_skip_modules"], written


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("bert", "bert.embeddings.position_ids"),
    ],
)
def test_buffers_that_are_not_stored_any_more_are_no_finding(
    name: str, stored: str, tmp_path: Path
) -> None:
    folder = write(name, tmp_path / "model")
    rewrite(folder, lambda tensors: {**tensors, stored: torch.ones(4)})
    equal(name, folder)
    assert "QM-ARCH-005" not in findings(folder).values()


# -- experts ---------------------------------------------------------------------------------------


def unstacked(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint of a version in which each expert had linears of its own."""
    gate, up, down = (
        ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    found = {}
    for key, tensor in tensors.items():
        block = key.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else key
        head, _, local = block.rpartition(".")
        for index, expert in enumerate(tensor):
            if local == "gate_up_proj":
                first, second = expert.chunk(2)
                found[f"{head}.{index}.{gate}.weight"] = first.contiguous()
                found[f"{head}.{index}.{up}.weight"] = second.contiguous()
            elif local == "down_proj" and key.endswith("experts.down_proj"):
                found[f"{head}.{index}.{down}.weight"] = expert.contiguous()
            else:
                found[block] = tensor
                break
    return found


def old_experts(name: str, folder: Path, **options: Any) -> Path:
    write(name, folder, **options)
    state = make(name, **options).state_dict()
    tensors = unstacked(name, {key: tensor.contiguous() for key, tensor in state.items()})
    assert any(re.search(r"experts\.0\..*weight", key) for key in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERTS = {"mixtral": {"num_local_experts": 12}, "qwen2-moe": {"num_experts": 12}}


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_experts_stored_one_by_one_are_stacked_in_order(name: str, tmp_path: Path) -> None:
    folder = old_experts(name, tmp_path / "old", **EXPERTS[name])
    ours = equal(name, folder)
    ours.save_pretrained(tmp_path / "saved")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(after) == set(before), "saved under the names that were read"
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_experts_stored_stacked_are_read(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "new", save={"save_original_format": False})
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored
    equal(name, folder)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_float_experts_beside_quantized_attention_survive(name: str, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    folder = old_experts(name, tmp_path / "old", **EXPERTS[name])
    ours: Any = quantmill.load(folder, "bnb-nf4", skip=["role:expert"])
    assert not hasattr(ours.model.layers[0].mlp.experts, "0")
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4", skip=["role:expert"])
    ours.save_pretrained(tmp_path / "saved")
    for written in ("out", "saved"):
        again = quantmill.load(tmp_path / written).state_dict()
        for key, tensor in ours.state_dict().items():
            assert torch.equal(again[key], tensor), (written, key)


def test_a_missing_expert_is_found(tmp_path: Path) -> None:
    folder = old_experts("mixtral", tmp_path / "old")
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    assert refused(folder) == {"model.layers.1.mlp.experts.2.w2.weight": "QM-ARCH-004"}
    also = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != also})
    assert refused(folder) == {
        "model.layers.1.mlp.experts.2.w2.weight": "QM-ARCH-004",
        "model.layers.0.mlp.experts.3.w1.weight": "QM-ARCH-004",
    }


def test_more_experts_than_the_config_counts_are_an_error(tmp_path: Path) -> None:
    folder = old_experts("mixtral", tmp_path / "old")
    rewrite(folder, config={"num_local_experts": 3})
    found = refused(folder)
    assert found["model.layers.0.mlp.experts"] == "QM-ARCH-003"


def test_a_converted_linear_is_saved_under_its_new_name_when_quantized(tmp_path: Path) -> None:
    """Dinov2 splits a fused linear: what became two quantized ones can't be fused again."""
    pytest.importorskip("quantmill_bnb")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "old")
    stored = load_file(tmp_path / "old" / "model.safetensors")
    assert "encoder.layer.0.mlp.weights_in.weight" in stored, "saved as version 4 did"
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours: Any = quantmill.load(tmp_path / "old")
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels).pooler_output, model(pixels).pooler_output)
    quantized: Any = quantmill.load(tmp_path / "old", "bnb-nf4")
    assert type(quantized.get_submodule("encoder.layer.0.mlp.gate_proj")) is not nn.Linear
    quantized.save_pretrained(tmp_path / "saved")
    quantmill.quantize(tmp_path / "old", tmp_path / "out", "bnb-nf4")
    for written in ("saved", "out"):
        again = quantmill.load(tmp_path / written).state_dict()
        for key, tensor in quantized.state_dict().items():
            assert torch.equal(again[key], tensor), (written, key)


# -- shards, missing and unexpected tensors --------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_shards_make_no_difference(name: str, small: Small, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "model", save={"max_shard_size": "60KB"})
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    equal(name, folder)
    pytest.importorskip("quantmill_bnb")
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4")
    quantmill.quantize(small(name), tmp_path / "one", "bnb-nf4")
    one, two = (load_file(tmp_path / part / "model.safetensors") for part in ("out", "one"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_a_broken_checkpoint_is_told_of_at_once(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "model")

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(7, 64)
        return {**tensors, "model.layers.0.mlp.extra.weight": torch.zeros(3)}

    rewrite(folder, damage)
    assert refused(folder) == {
        "model.layers.0.mlp.up_proj.weight": "QM-ARCH-004",
        "model.norm.weight": "QM-ARCH-004",
        "model.layers.1.mlp.up_proj.weight": "QM-ARCH-003",
    }
    assert findings(folder)["model.layers.0.mlp.extra.weight"] == "QM-ARCH-005"


def test_an_unexpected_tensor_is_a_warning_only(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "model")
    rewrite(folder, lambda tensors: {**tensors, "mtp.layers.0.weight": torch.ones(2, 2)})
    equal("llama", folder)
    assert findings(folder) == {"mtp.layers.0.weight": "QM-ARCH-005"}


def test_what_the_architecture_may_lack_is_made(tmp_path: Path) -> None:
    folder = write("bart", tmp_path / "model")
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "final_logits_bias"})
    ours = equal("bart", folder)
    assert torch.equal(ours.final_logits_bias, torch.zeros(1, 96))


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "wide"}, {"num_attention_heads": 7}, {"hidden_act": "no such function"}],
)
def test_a_config_that_no_model_can_have_is_a_finding(
    change: dict[str, Any], tmp_path: Path
) -> None:
    folder = rewrite(write("llama", tmp_path / "model"), config=change)
    assert set(refused(folder).values()) <= {"QM-TF-001", "QM-ARCH-003"}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no-such-type"},
        {"architectures": ["NoSuchModel"]},
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    ],
)
def test_an_unknown_model_is_planned_from_its_headers_only(
    change: dict[str, Any], tmp_path: Path
) -> None:
    folder = rewrite(write("llama", tmp_path / "model"), config=change)
    (folder / "evil.py").write_text("raise SystemExit('ran code of the checkpoint')")
    assert "QM-ARCH-001" in refused(folder).values()
    assert findings(folder)["model"] == "QM-ARCH-002"


def test_linears_of_a_class_of_their_own_are_told_of(small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    place = "transformer.h.0.self_attention.query_key_value and 7 more"
    assert findings(small("falcon"))[place] == "QM-TF-003"
    with pytest.raises(FindingsError):
        quantmill.load(small("falcon"), "bnb-nf4", strict=True)


@pytest.mark.parametrize("value", ["auto", None, "float99"])
def test_without_a_dtype_in_the_config_the_tensors_tell(value: Any, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "model", dtype=torch.bfloat16)
    rewrite(folder, config={"dtype": value})
    assert next(quantmill.load(folder).parameters()).dtype == torch.bfloat16
