"""Verification: peers' files are sound, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantmill
from quantmill.cli import main
from quantmill.testing import write_tiny_llama

for _package in ("awq", "bnb", "compressed_tensors", "gguf", "gptq"):
    pytest.importorskip(f"quantmill_{_package}")
pytest.importorskip("quantmill_transformers")

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
GPTQ = PLUGINS / "gptq" / "tests" / "data"
PEERS = sorted(path.parent for path in PLUGINS.glob("*/tests/data/*/model.safetensors"))
MLP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("folder", PEERS, ids=lambda path: path.name)
def test_files_of_peers_are_sound(folder: Path, tmp_path: Path) -> None:
    # Logits that were recorded beside the weights are no part of the checkpoint.
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("expected*"))
    found = quantmill.verify(copy)
    assert found.sound, [str(item) for item in found.findings]
    assert not found.findings.warnings, [str(item) for item in found.findings.warnings]
    assert found.checked["weights"] >= 13 and found.failed["config"] == 0


def test_a_gguf_file_is_sound() -> None:
    found = quantmill.verify(PLUGINS / "gguf" / "tests" / "data" / "tiny-Q4_K_M.gguf")
    assert found.sound and found.checked["weights"] > 14 and not found.findings.warnings
    assert not len(found.findings)  # Its tokenizer lies in it.


def damaged(tmp_path: Path, source: str, change: Any, config: Any = None) -> Any:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GPTQ / source, folder, ignore=shutil.ignore_patterns("expected*"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        for name in ("config.json", "quantize_config.json"):
            if (folder / name).exists():
                data = json.loads((folder / name).read_text())
                config(data.get("quantization_config", data))
                (folder / name).write_text(json.dumps(data))
    return quantmill.verify(folder)


def codes(found: Any) -> set[str]:
    return {item.code for item in found.findings if item.severity.value != "info"}


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    """Leave the tensors alone."""


def test_damage_to_tensors_is_named(tmp_path: Path) -> None:
    def nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MLP}.scales"][1, 5] = float("nan")

    found = damaged(tmp_path, "gptq-8-g64", nan)
    assert codes(found) == {"QM-GPTQ-001"} and not found.sound
    assert [item.where for item in found.findings.errors] == [MLP]

    def infinite_norm(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][7] = float("inf")

    assert codes(damaged(tmp_path, "gptq-8-g64", infinite_norm)) == {"QM-VERIFY-008"}

    def order(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MLP}.g_idx"][0] = (tensors[f"{MLP}.g_idx"][0] + 1) % 4

    assert codes(damaged(tmp_path, "gptq-4-g32-asym-actorder", order)) == {"QM-VERIFY-003"}

    def zeros(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MLP}.scales"].zero_()

    found = damaged(tmp_path, "gptq-8-g64", zeros)
    assert codes(found) == {"QM-VERIFY-005"} and found.sound

    def short(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MLP}.scales"] = tensors[f"{MLP}.scales"][:-1].clone()

    assert "QM-GPTQ-001" in codes(damaged(tmp_path, "gptq-8-g64", short))

    def outside(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MLP}.g_idx"][0] = 99

    assert "QM-GPTQ-001" in codes(damaged(tmp_path, "gptq-4-g32-asym-actorder", outside))


def test_all_damage_is_reported_at_once(tmp_path: Path) -> None:
    def several(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.mlp.up_proj.scales"][0, 0] = float("inf")
        tensors["model.norm.weight"][0] = float("nan")

    found = damaged(tmp_path, "gptq-8-g64", several)
    assert len(found.findings.errors) == 3
    assert found.failed["weights"] == 2 and found.failed["floats"] == 1


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 4), ("group_size", 32), ("sym", True), ("desc_act", False)]
)
def test_a_config_that_describes_other_tensors_is_named(
    field: str, value: Any, tmp_path: Path
) -> None:
    source = {"bits": "gptq-8-g64", "group_size": "gptq-8-g64"}.get(
        field, "gptq-4-g32-asym-actorder"
    )
    found = damaged(tmp_path, source, nothing, lambda config: config.update({field: value}))
    assert "QM-VERIFY-007" in codes(found), [str(item) for item in found.findings]
    causes = {item.cause for item in found.findings.warnings}
    assert any(
        word in cause for cause in causes for word in (field, "act-order", "middle", "scales")
    )


def test_checksums_and_ties(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "float", tied=True)
    quantmill.quantize(model, tmp_path / "out", "bnb-nf4")
    found = quantmill.verify(tmp_path / "out")
    assert found.sound and found.checked["checksums"] == 1 == found.checked["ties"]
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "QM-CKPT-063" in codes(quantmill.verify(tmp_path / "out"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "QM-VERIFY-009" in codes(quantmill.verify(model))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_the_command_s_exit_code_is_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_llama(tmp_path / "float")
    code, out, _ = run(capsys, "verify", str(model), "--json")
    assert code == 0 and json.loads(out)["sound"] is True
    change = {"model.norm.weight": torch.full((64,), float("nan"), dtype=torch.bfloat16)}
    bad = write_tiny_llama(tmp_path / "bad", change=change)
    code, out, err = run(capsys, "verify", str(bad))
    assert code == 1 and "not sound" in out and "QM-VERIFY-008" in err
