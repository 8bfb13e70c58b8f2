"""Importance matrices measured by the command: on dense and mixed models, against plain hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantmill
from quantmill.cli import main

testing = pytest.importorskip("quantmill_transformers.testing")
imatrix = pytest.importorskip("quantmill_gguf.imatrix")
container = pytest.importorskip("quantmill_gguf.container")

NOVELLA = Path(__file__).resolve().parents[2] / "models" / "novella"
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(item) for item in arguments])
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int) and "Traceback" not in captured.err
        return stopped.value.code, captured.out, captured.err

    return call


def tokens() -> Tensor:
    return torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "gpt2", "qwen2-moe"])
def made(request: Any, tmp_path: Path) -> tuple[str, Path, Path]:
    """A model's name, its folder and its text in tokens."""
    folder: Path = testing.write(request.param, tmp_path / "model")
    save_file({"input_ids": tokens()}, tmp_path / "tokens.safetensors")
    return request.param, folder, tmp_path / "tokens.safetensors"


NAMES = {
    "llama": {"model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight"},
    "gpt2": {"transformer.h.1.mlp.c_proj": "blk.1.ffn_down.weight"},
    "qwen2-moe": {"model.layers.1.self_attn.q_proj": "blk.1.attn_q.weight"},
}


def test_it_holds_mean_squares_of_inputs(
    made: tuple[str, Path, Path], cli: Cli, tmp_path: Path
) -> None:
    name, folder, text = made
    out = tmp_path / "imatrix.gguf"
    code, shown, _ = cli("imatrix", folder, out, "--calibration", text, "--json")
    report = json.loads(shown)
    assert code == 0 and report["windows"] == 6 and report["tokens"] == 192
    found = imatrix.Imatrix.read(out)
    assert (found.chunks, found.chunk_size, found.texts) == (6, 32, ["tokens.safetensors"])
    model: Any = quantmill.load(folder)
    for module, tensor in NAMES[name].items():
        seen: list[Tensor] = []
        hook = model.get_submodule(module).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        with torch.inference_mode():
            model(tokens())
        hook.remove()
        wanted = seen[0].float().square().mean(0)
        torch.testing.assert_close(found.entries[tensor].mean()[0], wanted, rtol=1e-3, atol=1e-9)
        assert found.entries[tensor].counts.tolist() == [192.0]
    assert "output.weight" not in found.entries
    # And what is quantized with it is a file that loads.
    code, _, err = cli("quantize", folder, tmp_path / "x.gguf", "gguf-q4_0", "--imatrix", out)
    assert code == 0, err
    assert (
        container.GgufFile.open(tmp_path / "x.gguf").metadata["quantize.imatrix.file"]
        == "imatrix.gguf"
    )
    quantmill.load(tmp_path / "x.gguf")


def test_each_expert_has_its_own_tokens(cli: Cli, tmp_path: Path) -> None:
    folder = testing.write("qwen2-moe", tmp_path / "model")
    save_file({"input_ids": tokens()}, tmp_path / "tokens.safetensors")
    out = tmp_path / "imatrix.gguf"
    assert cli("imatrix", folder, out, "--calibration", tmp_path / "tokens.safetensors")[0] == 0
    found = imatrix.Imatrix.read(out)
    up, down = (found.entries[f"blk.1.ffn_{part}_exps.weight"] for part in ("up", "down"))
    experts = len(up.counts)
    assert experts > 1 and torch.equal(up.counts, down.counts)
    config = json.loads((folder / "config.json").read_text())
    assert float(up.counts.sum()) == 192 * config["num_experts_per_tok"]
    # Experts see a part of the tokens that the router sees: their sums add up to its, weighted.
    assert up.sums.shape == (experts, config["hidden_size"])
    assert len({tuple(row.tolist()) for row in up.sums}) == experts


def test_a_float_file_is_measured_with_its_own_tokenizer(cli: Cli, tmp_path: Path) -> None:
    assert cli("quantize", NOVELLA, tmp_path / "f32.gguf", "gguf-f32")[0] == 0
    (tmp_path / "text.txt").write_text((NOVELLA / "calib.txt").read_text()[:2000])
    given = ("--calibration", tmp_path / "text.txt", "--calibration-length", 64)
    found = []
    for source in (tmp_path / "f32.gguf", NOVELLA):
        out = tmp_path / f"{source.stem}-imatrix.gguf"
        assert cli("imatrix", source, out, *given, "--dtype", "float32")[0] == 0
        found.append(imatrix.Imatrix.read(out).entries)
    assert found[0].keys() == found[1].keys()
    for name, entry in found[0].items():
        torch.testing.assert_close(entry.mean(), found[1][name].mean(), rtol=1e-3, atol=1e-7)


def test_the_head_is_measured_when_asked_for(cli: Cli, tmp_path: Path) -> None:
    folder = testing.write("llama", tmp_path / "model")
    out = tmp_path / "imatrix.dat"
    save_file({"input_ids": tokens()}, tmp_path / "tokens.safetensors")
    given = ("--calibration", tmp_path / "tokens.safetensors")
    assert cli("imatrix", folder, out, *given, "--head")[0] == 0
    assert "output.weight" in imatrix.Imatrix.read(out).entries


def test_wrong_use_is_explained(cli: Cli, tmp_path: Path) -> None:
    folder = testing.write("llama", tmp_path / "model")
    save_file({"input_ids": tokens()}, tmp_path / "tokens.safetensors")
    given = ("--calibration", tmp_path / "tokens.safetensors")
    out = tmp_path / "imatrix.gguf"

    def finding(*arguments: object) -> str:
        code, shown, _ = cli("imatrix", *arguments, "--json")
        assert code == 1
        return str(json.loads(shown)["findings"][0]["code"])

    assert finding(folder, tmp_path / "imatrix.txt", *given) == "QM-IMATRIX-001"
    (tmp_path / "there.gguf").touch()
    assert finding(folder, tmp_path / "there.gguf", *given) == "QM-IMATRIX-002"
    quantmill.quantize(folder, tmp_path / "nf4", "bnb-nf4")
    assert finding(tmp_path / "nf4", out, *given) == "QM-IMATRIX-003"
    quantmill.quantize(folder, tmp_path / "q8.gguf", "gguf-q8_0")
    assert finding(tmp_path / "q8.gguf", out, *given) == "QM-IMATRIX-003"
    assert finding(folder, out) == "QM-CALIB-001"
    bert = testing.write("opt", tmp_path / "opt")
    assert finding(bert, out, *given).startswith("QM-GGUF-0")
    assert not out.exists()


def test_with_it_two_bits_are_better(tmp_path: Path) -> None:
    """On a text that it was not measured on."""
    report = quantmill.imatrix(
        NOVELLA, tmp_path / "imatrix.gguf", calibration=NOVELLA / "calib.txt", samples=6, length=256
    )
    assert report.modules == 56
    tokenizer = quantmill.load_tokenizer(NOVELLA)
    text = (NOVELLA / "held.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"][: 4 * 128]).reshape(4, 128)
    with torch.inference_mode():
        wanted = quantmill.load(NOVELLA)(ids).logits.float().log_softmax(-1)
    divergence = []
    for options in ({}, {"imatrix": str(tmp_path / "imatrix.gguf")}):
        model = quantmill.load(NOVELLA, {"method": "gguf-q2_k", **options})
        with torch.inference_mode():
            found = model(ids).logits.float().log_softmax(-1)
        divergence.append(float((wanted.exp() * (wanted - found)).sum(-1).mean()))
    plain, weighed = divergence
    assert weighed < 0.95 * plain
