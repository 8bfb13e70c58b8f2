"""Conversion by files of peers and of ours: routes, proofs, requantization, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantmill
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_gpt2, write_tiny_llama

for _package in ("awq", "bnb", "compressed_tensors", "gguf", "gptq", "hqq"):
    pytest.importorskip(f"quantmill_{_package}")
pytest.importorskip("quantmill_transformers")

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
GPTQ = PLUGINS / "gptq" / "tests" / "data"
AWQ = PLUGINS / "awq" / "tests" / "data"
IDS = torch.arange(12).reshape(1, 12)


def stored(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]
    return found


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model: Any = quantmill.load(folder, dequantize=True, **options)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def refused(code: str, source: Path, output: Path, method: Any, **options: Any) -> str:
    with pytest.raises(QuantmillError) as caught:
        quantmill.convert(source, output, method, **options)
    assert code in {item.code for item in caught.value.findings}, str(caught.value)
    assert not output.exists() or not any(output.iterdir())
    return str(caught.value)


# --- lossless ---------------------------------------------------------------------------------


def test_a_gptqmodel_checkpoint_becomes_awq_and_back_with_the_same_bytes(tmp_path: Path) -> None:
    source = GPTQ / "gptq-4-g128-v2"
    there = quantmill.convert(source, tmp_path / "awq", "awq", verify=True)
    assert there.route.kind == "lossless" and there.proved == 14
    assert stored(tmp_path / "awq")["quant_method"] == "awq"
    quantmill.convert(tmp_path / "awq", tmp_path / "again", "gptq:checkpoint_format=gptq_v2")
    assert stored(tmp_path / "again")["format"] == "gptq_v2"
    first = load_file(source / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_versions_of_gptq_differ_in_zero_points_only(tmp_path: Path) -> None:
    source = GPTQ / "gptq-4-g128-v2"
    quantmill.convert(source, tmp_path / "v1", "gptq:checkpoint_format=gptq", verify=True)
    old, new = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "v1" / "model.safetensors"),
    )
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing and all(name.endswith("qzeros") for name in differing)
    assert torch.equal(logits(source), logits(tmp_path / "v1"))


def test_modules_of_several_widths_are_said_as_the_peer_says_them(tmp_path: Path) -> None:
    source = GPTQ / "gptq-4-dynamic"
    report = quantmill.convert(source, tmp_path / "ct", "compressed-tensors", verify=True)
    assert report.route.kind == "lossless"
    groups = stored(tmp_path / "ct")["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {4, 8}
    quantmill.convert(tmp_path / "ct", tmp_path / "gptq", "gptq", verify=True)
    assert stored(tmp_path / "gptq")["dynamic"]
    assert torch.equal(logits(source), logits(tmp_path / "gptq"))


def test_codes_of_a_width_that_only_planes_have_choose_that_format(tmp_path: Path) -> None:
    source = AWQ / "awq-4-g128-gemm"
    quantmill.convert(source, tmp_path / "wide", "gptq:bits=5", verify=True)
    assert stored(tmp_path / "wide")["checkpoint_format"] == "gptq_p"
    assert torch.equal(logits(tmp_path / "wide"), logits(source))


def test_a_smaller_group_that_is_asked_for_repeats_scales(tmp_path: Path) -> None:
    source = AWQ / "awq-4-g128-gemm"
    report = quantmill.convert(source, tmp_path / "out", "gptq:group_size=64", verify=True)
    assert report.route.kind == "lossless" and stored(tmp_path / "out")["group_size"] == 64
    message = refused("QM-CONVERT-002", source, tmp_path / "no", "gptq:group_size=256")
    assert "128 columns, asked are 256" in message


def test_a_gguf_file_becomes_a_folder_with_its_head_and_embedding_as_floats(
    tmp_path: Path,
) -> None:
    source = PLUGINS / "gguf" / "tests" / "data" / "tiny-Q4_K_M.gguf"
    report = quantmill.convert(source, tmp_path / "f", "fp32", verify=True)
    assert report.route.kind == "dequantize" and report.total.equal
    assert torch.equal(logits(source, dtype="float32"), logits(tmp_path / "f"))
    assert "quantization_config" not in json.loads((tmp_path / "f" / "config.json").read_text())


def test_floats_of_16_bits_state_their_rounding(tmp_path: Path) -> None:
    source = AWQ / "awq-4-g128-gemm"
    report = quantmill.convert(source, tmp_path / "half", "fp16", verify=True)
    assert len(report.errors) == 16 and 0 < report.total.relative < 2e-3
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    source = shutil.copytree(AWQ / "awq-4-g128-gemm", tmp_path / "source")
    beside = {"tokenizer.json": b"{}", "generation_config.json": b'{"max_length": 7}'}
    for name, content in beside.items():
        (source / name).write_bytes(content)
    quantmill.convert(source, tmp_path / "out", "gptq")
    for name, content in beside.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float", tied=True)
    quantmill.quantize(model, tmp_path / "nf4", "bnb-nf4-dq")
    report = quantmill.convert(tmp_path / "nf4", tmp_path / "plain", "bnb-nf4", verify=True)
    assert report.route.kind == "lossless"
    assert report.route.steps[1].notes == ("nested scales become plain ones",)
    assert "lm_head.weight" not in load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "nf4"), logits(tmp_path / "plain"))


def test_shards_and_a_dry_run(tmp_path: Path) -> None:
    source = AWQ / "awq-4-g128-gemm"
    dry = quantmill.convert(source, tmp_path / "out", "gptq", dry_run=True)
    assert dry.written is None and not (tmp_path / "out").exists() and not dry.route.settled
    report = quantmill.convert(source, tmp_path / "out", "gptq", max_shard_bytes=100_000)
    assert sum(name.endswith(".safetensors") for name in report.written.files) > 2
    planned = {step.name: step.bytes_after for step in dry.route.steps}
    made = {step.name: step.bytes_after for step in report.route.steps}
    assert planned == made
    assert torch.equal(logits(source), logits(tmp_path / "out"))


# --- requantization ---------------------------------------------------------------------------


def test_requantization_is_asked_for_and_its_error_is_stated(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float", hidden=128, inner=128)
    quantmill.quantize(model, tmp_path / "nf4", "bnb-nf4")
    message = refused("QM-CONVERT-002", tmp_path / "nf4", tmp_path / "no", "hqq-4")
    assert "--allow-requantize" in message
    report = quantmill.convert(
        tmp_path / "nf4", tmp_path / "hqq", "hqq-4", allow_requantize=True, verify=True
    )
    assert report.route.kind == "requantize" and len(report.errors) == 14 == report.proved
    assert 0.02 < report.total.relative < 0.2
    # The error is that of the written file against the dequantized source.
    quantmill.convert(tmp_path / "nf4", tmp_path / "a", "fp32")
    quantmill.convert(tmp_path / "hqq", tmp_path / "b", "fp32")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    name = "model.layers.1.mlp.up_proj"
    error = (b[f"{name}.weight"] - a[f"{name}.weight"]).norm() / a[f"{name}.weight"].norm()
    assert report.errors[name].relative == pytest.approx(float(error), rel=1e-4)


def test_a_calibrated_goal_takes_calibration_data(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float", hidden=128, inner=128)
    quantmill.quantize(model, tmp_path / "nf4", "bnb-nf4")
    options: dict[str, Any] = {"allow_requantize": True}
    refused("QM-METHOD-002", tmp_path / "nf4", tmp_path / "no", "gptq-4", **options)
    tokens = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
    report = quantmill.convert(
        tmp_path / "nf4", tmp_path / "out", "gptq-4", calibration=tokens, verify=True, **options
    )
    assert report.losses and 0 < report.total.relative < 0.3
    report = quantmill.convert(
        tmp_path / "nf4", tmp_path / "awq", "awq-4", calibration=tokens, verify=True, **options
    )
    # AWQ moves scales into the norms: single weights can't be compared, and that is said.
    assert report.rescaled and not report.errors


def test_a_float_source_is_quantized(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float")
    report = quantmill.convert(model, tmp_path / "out", "bnb-int8", verify=True)
    assert report.route.kind == "quantize" and 0 < report.total.relative < 0.02
    quantmill.quantize(model, tmp_path / "direct", "bnb-int8")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "direct"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    half = quantmill.convert(model, tmp_path / "half", "fp16")
    assert half.route.kind == "dequantize" and half.total.relative < 1e-3


# --- bad input --------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(QuantmillError, match="QM-CKPT-050"):
        quantmill.convert(AWQ / "awq-4-g128-gemm", tmp_path / "out", "gptq")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_half_written_source_is_named(tmp_path: Path) -> None:
    source = shutil.copytree(AWQ / "awq-4-g128-gemm", tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused("QM-CKPT-020", source, tmp_path / "out", "gptq")
    tensors = load_file(AWQ / "awq-4-g128-gemm" / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.scales"
    save_file({k: v for k, v in tensors.items() if k != lost}, file)
    assert "scales" in refused("QM-AWQ-001", source, tmp_path / "out", "gptq")


def test_a_false_proof_removes_what_was_written(tmp_path: Path, monkeypatch: Any) -> None:
    from quantmill_gptq.codec import GptqCodec

    encode = GptqCodec.encode

    def wrong(self: Any, form: Any) -> dict[str, torch.Tensor]:
        made = encode(self, form)
        return {**made, "scales": made["scales"] * 2}

    monkeypatch.setattr(GptqCodec, "encode", wrong)
    refused("QM-CONVERT-003", AWQ / "awq-4-g128-gemm", tmp_path / "out", "gptq", verify=True)
    assert not (tmp_path / "out").exists()


def test_kinds_of_modules_that_a_format_does_not_know_become_floats(tmp_path: Path) -> None:
    model = write_tiny_gpt2(tmp_path / "gpt2")
    quantmill.quantize(model, tmp_path / "nf4", "bnb-nf4")
    report = quantmill.convert(tmp_path / "nf4", tmp_path / "out", "hqq", verify=True)
    kinds = report.route.counts
    assert kinds["float"] == 8 and "exact" not in kinds
    assert torch.equal(logits(tmp_path / "nf4"), logits(tmp_path / "out"))


def test_a_source_without_a_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a.weight": torch.ones(8, 8)}, folder / "model.safetensors")
    refused("QM-CONVERT-005", folder, tmp_path / "out", "bf16")


def test_an_architecture_that_a_format_has_no_name_for_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 128}
    config = OPTConfig(**sizes, vocab_size=256, max_position_embeddings=64, word_embed_proj_dim=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    for method in ("gguf-q8_0", "gguf"):
        output = tmp_path / "out.gguf"
        with pytest.raises(QuantmillError, match="is known for 'opt'"):
            quantmill.convert(tmp_path / "opt", output, method)
        assert not output.exists()


def test_a_missing_tokenizer_is_named_where_it_is_needed(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float")
    report = quantmill.convert(model, tmp_path / "out.gguf", "gguf-q8_0")
    assert "QM-GGUF-043" in {item.code for item in report.route.findings}
    report = quantmill.convert(model, tmp_path / "folder", "fp16")
    assert "QM-SOURCE-001" in {item.code for item in report.route.findings}
    (model / "tokenizer.json").write_text("{}")
    report = quantmill.convert(model, tmp_path / "whole", "fp16")
    assert "QM-SOURCE-001" not in {item.code for item in report.route.findings}
    (model / "tokenizer.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text("Nobody can read this. " * 200)
    refused("QM-CALIB-050", model, tmp_path / "out", "gptq-4:group_size=32", calibration=text)


def test_modules_can_not_be_chosen(tmp_path: Path) -> None:
    method = {"method": "gptq", "skip": ["layers:0"]}
    refused("QM-CONVERT-001", AWQ / "awq-4-g128-gemm", tmp_path / "out", method)


def test_unknown_goals_and_options_are_named(tmp_path: Path) -> None:
    source = AWQ / "awq-4-g128-gemm"
    refused("QM-SELECT-001", source, tmp_path / "out", "gtpq")
    refused("QM-CONFIG-001", source, tmp_path / "out", "gptq:grup_size=64")
    refused("QM-CONFIG-002", source, tmp_path / "out", "gptq:bits=9")


def test_a_value_beyond_float16_is_named(tmp_path: Path) -> None:
    big = torch.full((64, 64), 1e6, dtype=torch.bfloat16)
    change = {"model.layers.0.self_attn.o_proj.weight": big}
    model = write_tiny_llama(tmp_path / "float", change=change)
    quantmill.quantize(model, tmp_path / "nf4", "bnb-nf4")
    message = refused("QM-WEIGHT-003", tmp_path / "nf4", tmp_path / "out", "fp16")
    assert "layers.0.self_attn.o_proj" in message
