"""Calibrated methods through the one engine: better than rounding, resumable, loud."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantmill
from quantmill.api import make_job, prepare
from quantmill.calibration.carry_out import resume_folder
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_llama

METHODS = [
    "gptq-4:group_size=32",
    "gptq-3:group_size=32,desc_act=true,sym=false",
    "awq-4:group_size=32",
]
GPTAQ = "gptq-3:group_size=32,gptaq_alpha=0.5"


@pytest.fixture
def tokens() -> Tensor:
    # Few distinct tokens in runs: inputs are far from white, so calibration has what to learn.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 24, (16, 48), generator=generator).repeat_interleave(2, dim=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "float", hidden=96, inner=160, layers=3, heads=4)


def test_a_plan_counts_what_calibrating_holds(folder: Path) -> None:
    def peak(method: str, **options: Any) -> int:
        plan = prepare(make_job(folder, method, planning=True, **options))
        found: int = plan.totals["quantizing_bytes"]
        return found

    few, many = (peak("gptq-4:group_size=32", samples=n, length=64) for n in (100, 1100))
    # Hidden states of bfloat16: of a window where it waits, and twelve like it within a block.
    assert many - few == 1000 * 64 * 96 * 2 * 13
    assert peak("gptq-4:group_size=32", samples=100, length=64) > 24 * 160**2 + 2048 * 160 * 18
    assert peak("hqq-4:group_size=32", samples=100) == peak("hqq-4:group_size=32", samples=1100)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=tokens[:8]).logits.float()
    return result


@pytest.mark.parametrize("method", METHODS)
def test_calibration_beats_rounding_to_nearest(method: str, folder: Path, tokens: Tensor) -> None:
    exact = _logits(quantmill.load(folder), tokens)
    errors = {}
    # One token of data is next to none: damping makes GPTQ's Hessian the identity.
    for name, data in (("calibrated", tokens), ("rounded", torch.zeros(1, 1, dtype=torch.int64))):
        extra = "" if name == "calibrated" or "awq" in method else ",damp_percent=0.99"
        if name == "rounded" and "awq" in method:
            extra = ",clip=false,grid=1"
        model = quantmill.load(folder, method + extra, calibration=data)
        errors[name] = (_logits(model, tokens) - exact).norm() / exact.norm()
    assert errors["calibrated"] < 0.95 * errors["rounded"]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_what_is_loaded(
    method: str, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    live: Any = quantmill.load(folder, method, calibration=tokens)
    report = quantmill.quantize(folder, tmp_path / "out", method, calibration=tokens)
    again: Any = quantmill.load(tmp_path / "out")
    assert torch.equal(_logits(live, tokens), _logits(again, tokens))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == stored
    assert not quantmill.plan(tmp_path / "out").findings.errors
    assert report.plan.totals["bytes_after"] == pytest.approx(
        sum(t.numel() * t.element_size() for t in again.state_dict().values()), rel=0.02
    )


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("method", [*METHODS[1:], GPTAQ])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_job_goes_on_with_the_same_bytes(
    method: str, at: int, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    quantmill.quantize(folder, tmp_path / "whole", method, calibration=tokens)

    def stop(done: int, total: int, what: str) -> None:
        if done == at:
            raise _Stopped

    out = tmp_path / "out"
    with pytest.raises(_Stopped):
        quantmill.quantize(folder, out, method, calibration=tokens, progress=stop)
    assert not out.exists() and resume_folder(out).is_dir()
    seen: list[str] = []
    quantmill.quantize(
        folder, out, method, calibration=tokens, progress=lambda d, t, what: seen.append(what)
    )
    assert not any(f"layers.{index} " in what for index in range(at) for what in seen)
    assert not resume_folder(out).exists()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_what_the_blocks_before_did_is_made_up_for(
    folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    exact: Any = quantmill.load(folder)
    with torch.inference_mode():
        wanted = exact(tokens).logits.log_softmax(-1)
        errors = []
        for method in (GPTAQ.partition(",")[0], GPTAQ):
            quantmill.quantize(folder, tmp_path / "out", method, calibration=tokens)
            model: Any = quantmill.load(tmp_path / "out")
            found = model(tokens).logits.log_softmax(-1)
            errors.append(float((wanted.exp() * (wanted - found)).sum(-1).mean()))
            shutil.rmtree(tmp_path / "out")
    assert errors[1] < 0.97 * errors[0]


def test_one_module_alone_may_make_up_for_them(
    folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    name = "model.layers.2.self_attn.k_proj"
    plain, own = (
        {"method": "gptq-3", "group_size": 32},
        {"+:.*layers.2.*k_proj$": {"gptaq_alpha": 0.5}},
    )
    found = []
    for number, method in enumerate((plain, {**plain, "dynamic": own})):
        quantmill.quantize(folder, tmp_path / str(number), method, calibration=tokens)
        found.append(load_file(tmp_path / str(number) / "model.safetensors"))
    changed = {key for key in found[0] if not torch.equal(found[0][key], found[1][key])}
    assert f"{name}.qweight" in changed
    assert all(
        ".layers.2." in key and "q_proj" not in key and "v_proj" not in key for key in changed
    )


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_model_of_one_block_needs_none_of_its_outputs(
    method: str, tokens: Tensor, tmp_path: Path
) -> None:
    source = write_tiny_llama(tmp_path / "float", hidden=96, inner=160, layers=1, heads=4)
    quantmill.quantize(source, tmp_path / "whole", method, calibration=tokens)

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("outside"):
            raise _Stopped

    with pytest.raises(_Stopped):
        quantmill.quantize(source, tmp_path / "out", method, calibration=tokens, progress=stop)
    quantmill.quantize(source, tmp_path / "out", method, calibration=tokens)
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()


def test_a_killed_job_refuses_another_config(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise _Stopped

    out = tmp_path / "out"
    with pytest.raises(_Stopped):
        quantmill.quantize(folder, out, METHODS[0], calibration=tokens, progress=stop)
    # No checkpoint records how often codes were chosen again.
    unrecorded = f"{METHODS[0]},refinements=3"
    for change in ({"method": METHODS[1]}, {"method": unrecorded}, {"calibration": tokens[:8]}):
        arguments: Any = {"method": METHODS[0], "calibration": tokens, **change}
        with pytest.raises(QuantmillError) as caught:
            quantmill.quantize(folder, out, **arguments)
        assert caught.value.findings[0].code == "QM-CALIB-030"
    quantmill.quantize(folder, out, METHODS[0], calibration=tokens)


def _held() -> int:
    """Bytes of all tensors that are reachable."""
    gc.collect()
    tensors: list[Tensor] = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    tensors = [item for item in tensors if item.layout is torch.strided]
    storages = {item.untyped_storage().data_ptr(): item for item in tensors if not item.is_meta}
    return sum(item.untyped_storage().nbytes() for item in storages.values())


@pytest.mark.parametrize("method", ["gptq-4:group_size=32", "awq-4:group_size=32"])
def test_no_block_is_held_when_its_turn_is_over(
    method: str, tokens: Tensor, tmp_path: Path
) -> None:
    folder = write_tiny_llama(tmp_path / "float", hidden=96, inner=160, layers=6, heads=4)
    held = {}

    def progress(done: int, total: int, what: str) -> None:
        if what in ("model.layers.1", "model.layers.5"):
            held[what] = _held()

    quantmill.quantize(folder, tmp_path / "out", method, calibration=tokens, progress=progress)
    weights = 4 * 96 * 96 + 3 * 96 * 160
    # Four further blocks leave less than a quarter of one behind.
    assert held["model.layers.5"] - held["model.layers.1"] < 2 * weights // 4


def test_options_per_module_reach_the_calibrator_and_the_checkpoint(
    folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    dynamic = {r"-:.*\.0\.self_attn\.o_proj$": {}, r"+:.*down_proj$": {"bits": 8}}
    method = {"method": "gptq-4", "group_size": 32, "dynamic": dynamic}
    quantmill.quantize(folder, tmp_path / "out", method, calibration=tokens)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "gptq" and stored["dynamic"] == dynamic
    forms = {i.name: i.form for i in quantmill.plan(tmp_path / "out").modules}
    assert "8-bit" in forms["model.layers.1.mlp.down_proj"]
    assert forms["model.layers.0.self_attn.o_proj"] == "BF16"


def test_the_head_is_quantized_when_asked(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    method = {"method": "gptq-8", "group_size": 32, "lm_head": True}
    quantmill.quantize(folder, tmp_path / "out", method, calibration=tokens)
    model: Any = quantmill.load(tmp_path / "out")
    assert "lm_head.qweight" in model.state_dict()
    exact = _logits(quantmill.load(folder), tokens)
    assert (_logits(model, tokens) - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (None, "QM-METHOD-002"),
        (torch.zeros(5, dtype=torch.int64), "QM-CALIB-002"),
        (torch.full((2, 16), 256), "QM-CALIB-003"),
        (torch.full((2, 16), -1), "QM-CALIB-003"),
        ("no-such-file.txt", "QM-CALIB-001"),
        ([], "QM-CALIB-001"),
    ],
    ids=["none", "short", "beyond", "negative", "missing", "empty"],
)
def test_bad_data_is_refused_before_anything_is_written(
    data: Any, code: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantmillError) as caught:
        quantmill.quantize(folder, tmp_path / "out", "gptq-4", calibration=data)
    assert code in {item.code for item in caught.value.findings}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS[1:])
def test_nan_activations_name_the_module(
    method: str, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    weight = torch.ones(96, dtype=torch.bfloat16)
    weight[3] = float("nan")
    name = "model.layers.1.post_attention_layernorm.weight"
    bad = write_tiny_llama(
        tmp_path / "nan", hidden=96, inner=160, layers=3, heads=4, change={name: weight}
    )
    with pytest.raises(QuantmillError) as caught:
        quantmill.load(bad, method, calibration=tokens)
    assert "layers.1.mlp" in caught.value.findings[0].where


def test_a_model_of_one_repeated_token_is_quantized_all_the_same(folder: Path) -> None:
    """A Hessian of rank one: damping carries it."""
    model = quantmill.load(folder, METHODS[0], calibration=torch.zeros(4, 32, dtype=torch.int64))
    assert torch.isfinite(_logits(model, torch.zeros(8, 4, dtype=torch.int64))).all()


@pytest.mark.parametrize("first", ["gptq-4:group_size=32", "awq-4:group_size=32"])
def test_two_calibrated_methods_share_one_run(
    first: str, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    exact = _logits(quantmill.load(folder), tokens)
    second = next(item for item in (METHODS[0], METHODS[2]) if item != first)
    mixed = {"method": first, "assign": {"**.mlp.*": second, "layers:2": "bnb-nf4"}}
    out = tmp_path / "out"
    quantmill.quantize(folder, out, mixed, calibration=tokens)
    labels = {item.method for item in quantmill.plan(out).modules if item.method}
    assert len(labels) == 3
    quantized = _logits(quantmill.load(out), tokens)
    alone = _logits(quantmill.load(folder, first, calibration=tokens), tokens)
    error, bound = ((item - exact).norm() / exact.norm() for item in (quantized, alone))
    assert error < 2 * bound
    live = _logits(quantmill.load(folder, mixed, calibration=tokens), tokens)
    assert torch.equal(live, quantized)
