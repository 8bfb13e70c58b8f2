"""Comparison of two checkpoints: distances, judgement, the page, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantmill
from quantmill.cli import main
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_gpt2, write_tiny_llama

for _package in ("awq", "bnb", "hqq"):
    pytest.importorskip(f"quantmill_{_package}")
pytest.importorskip("quantmill_transformers")

NOVELLA = Path(__file__).resolve().parents[2] / "models" / "novella"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    made = {"float": write_tiny_llama(root / "float", hidden=128, inner=128)}
    for name in ("bnb-nf4", "hqq-8"):
        quantmill.quantize(made["float"], root / name, name)
        made[name] = root / name
    return made


def test_distances_are_those_of_the_dequantized_weights(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    found = quantmill.compare(folders["float"], folders["bnb-nf4"])
    quantmill.convert(folders["bnb-nf4"], tmp_path / "fp32", "fp32")
    exact = load_file(folders["float"] / "model.safetensors")
    made = load_file(tmp_path / "fp32" / "model.safetensors")
    matrices = [item for item in found.modules if item.is_matrix]
    assert len(matrices) == 16
    for item in matrices:
        a, b = exact[f"{item.name}.weight"].float(), made[f"{item.name}.weight"].float()
        assert item.distance.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-4)
        assert item.distance.largest == pytest.approx(float((b - a).abs().max()), rel=1e-6)
        assert sum(item.values[0]) == sum(item.values[1]) == a.numel()
        quantized = "layers" in item.name
        assert item.distance.equal is not quantized
        assert (item.codes[1] is not None) is quantized and item.codes[0] is None
        if item.codes[1] is not None:
            assert len(item.codes[1]) == 16 and sum(item.codes[1]) == a.numel()
    assert 18 < found.total.snr < 25
    assert found.bytes[1] < found.bytes[0] / 2


def test_two_quantized_checkpoints_and_equal_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    found = quantmill.compare(folders["hqq-8"], folders["bnb-nf4"])
    assert not found.total.equal and found.modules[1].forms[0].startswith("affine")
    quantmill.convert(folders["hqq-8"], tmp_path / "fp32", "fp32")
    same = quantmill.compare(folders["hqq-8"], tmp_path / "fp32")
    assert same.total.equal and same.total.to_dict()["snr_db"] == float("inf")


def test_a_text_is_judged_as_eval_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTMILL_CACHE", str(tmp_path / "cache"))
    quantmill.quantize(NOVELLA, tmp_path / "nf4", "bnb-nf4")
    text, model, made = str(NOVELLA / "held.txt"), str(NOVELLA), str(tmp_path / "nf4")
    shared = ["--text", text, "--max-windows", "2", "--context", "128", "--json"]
    judged = json.loads(run(capsys, "compare", model, made, *shared))["judgement"]
    evaluated = json.loads(run(capsys, "eval", made, "--reference", model, *shared))
    assert judged["kl"] == pytest.approx(evaluated["kl_mean"], rel=1e-6)
    assert judged["top1_agreement"] == evaluated["top1_agreement"]
    assert judged["perplexity"][1] == pytest.approx(evaluated["perplexity"], rel=1e-6)
    own = json.loads(run(capsys, "eval", model, *shared))
    assert judged["perplexity"][0] == pytest.approx(own["perplexity"], rel=1e-3)
    assert 0 < judged["kl"] < 0.1 and judged["tokens"] == 254


def test_the_page_needs_nothing_else(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    pair = (str(folders["float"]), str(folders["bnb-nf4"]))
    assert "dB over all weights" in run(capsys, "compare", *pair, "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|src=|@import|url\(", text)
    assert text.count("<svg") >= 3 + 2 * 7 and "up_proj, layer 1:" in text
    assert text.count("<tr>") == 1 + 16  # every weight is in the table
    assert "<script>" in text and len(text) < 400_000


def test_scales_that_calibration_moved_are_told(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float", hidden=128, inner=128, vocab=64)
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    quantmill.quantize(model, tmp_path / "awq", "awq-4", calibration=tokens, samples=8, length=32)
    found = quantmill.compare(model, tmp_path / "awq")
    moved = {item.code for item in found.findings if item.code == "QM-COMPARE-003"}
    assert bool(moved) is found.rescaled
    if found.rescaled:
        worse = [i for i in found.modules if i.is_matrix and i.distance.relative > 0]
        assert all(found.error(item) <= item.distance.relative * 1.05 for item in worse)


def refused(code: str, first: Path, second: Path) -> str:
    with pytest.raises(QuantmillError) as caught:
        quantmill.compare(first, second)
    assert caught.value.findings[0].code == code
    return str(caught.value)


def test_two_different_models_are_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "wide", hidden=64)
    message = refused("QM-COMPARE-001", folders["float"], other)
    assert "[256, 128] and [256, 64]" in message
    assert "gpt2" in refused("QM-COMPARE-001", folders["float"], write_tiny_gpt2(tmp_path / "g"))
    deep = write_tiny_llama(tmp_path / "deep", hidden=128, inner=128, layers=3)
    assert "only the second has" in refused("QM-COMPARE-001", folders["float"], deep)
    stranger = write_tiny_llama(tmp_path / "stranger", hidden=128, inner=128, seed=1)
    refused("QM-COMPARE-002", folders["float"], stranger)
    quantmill.quantize(stranger, tmp_path / "nf4", "bnb-nf4")
    refused("QM-COMPARE-002", folders["float"], tmp_path / "nf4")
