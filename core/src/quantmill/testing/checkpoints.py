"""Promises about written checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantmill
from quantmill.checkpoint.source import open_source, read_headers
from quantmill.findings import QuantmillError
from quantmill.job import Selection
from quantmill.registrations import Capabilities
from quantmill.testing.base import Conformance, attempt, errors_of, normal, same, sound
from quantmill.testing.fabricate import write_tiny_llama
from quantmill.testing.forms import damages

__all__ = ["CheckpointPromises"]


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


class CheckpointPromises(Conformance):
    """What is written has the planned size, nothing is lost, and damage is noticed."""

    def test_what_is_not_serialisable_refuses_to_write(
        self, folder: Path, able: Capabilities
    ) -> None:
        if able.serialisable:
            pytest.skip("declared as serialisable")
        with pytest.raises(QuantmillError) as caught:
            self.write(folder, folder.parent / "out")
        assert "QM-METHOD-001" in {item.code for item in errors_of(caught.value.findings)}
        assert not (folder.parent / "out").exists()

    def test_a_written_checkpoint_has_the_planned_size(self, folder: Path, written: Path) -> None:
        planned = quantmill.plan(folder, self.method).totals["bytes_after"]
        size = read_headers(open_source(written)).total_bytes
        # Text in a layout may be longer or shorter than planned.
        assert abs(size - planned) <= 0.02 * size

    def test_writing_twice_gives_the_same_bytes(self, folder: Path, written: Path) -> None:
        again = self.write(folder, folder.parent / "again")
        names = sorted(path.name for path in written.glob("model*"))
        assert names and names == sorted(path.name for path in again.glob("model*"))
        for name in (*names, "config.json"):
            assert (again / name).read_bytes() == (written / name).read_bytes()

    def test_the_source_is_not_touched_and_the_output_not_overwritten(
        self, folder: Path, able: Capabilities
    ) -> None:
        self.needs_writing(able)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.write(folder, folder.parent / "out")
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(QuantmillError):
            self.write(folder, folder.parent / "out")

    def test_what_stays_float_keeps_its_bits(self, folder: Path, written: Path) -> None:
        if self.changes_float:
            pytest.skip("it folds scales into what stays float")
        before, after = stored(folder), stored(written)
        kept = [name for name in before if "norm" in name or "lm_head" in name]
        assert len(kept) == 6
        assert same({name: after[name] for name in kept}, {name: before[name] for name in kept})

    def test_biases_are_kept(self, tmp_path: Path, able: Capabilities) -> None:
        if self.changes_float:
            pytest.skip("it folds scales into what stays float")
        self.needs_writing(able)
        source = write_tiny_llama(tmp_path / "biased", bias=True)
        before, after = stored(source), stored(self.write(source, tmp_path / "out"))
        biases = [name for name in before if name.endswith(".bias")]
        assert len(biases) == 8
        assert same({n: after[n] for n in biases}, {n: before[n] for n in biases})

    def test_its_config_says_how_it_was_made(self, written: Path, selection: Selection) -> None:
        config = json.loads((written / "config.json").read_text())["quantization_config"]
        again, _ = type(selection.config).from_checkpoint(config)
        assert again == selection.config.keeping(["lm_head"])

    def test_it_can_be_planned_and_inspected_without_a_finding_of_error(
        self, folder: Path, written: Path, framework: None
    ) -> None:
        assert not errors_of(quantmill.plan(written).findings)
        found = quantmill.inspect(written)
        assert not errors_of(found.findings)
        quantized = [item for item in found.modules if item["method"]]
        assert len(quantized) == quantmill.plan(folder, self.method).totals["quantized"] >= 14

    def test_asking_for_the_method_it_has_is_no_contradiction(
        self, written: Path, framework: None
    ) -> None:
        assert not errors_of(quantmill.plan(written, self.method).findings)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_is_found_and_named_and_nothing_is_written(
        self, tmp_path: Path, able: Capabilities, value: float
    ) -> None:
        self.needs_writing(able)
        name, weight = "model.layers.1.self_attn.q_proj.weight", normal((64, 64))
        weight[3, 5] = value
        bad = write_tiny_llama(tmp_path / "bad", change={name: weight})
        before = set(tmp_path.iterdir())
        with pytest.raises(QuantmillError) as caught:
            self.write(bad, tmp_path / "out")
        assert name in str(caught.value) and "[3, 5]" in str(caught.value)
        sound(caught.value.findings)
        assert set(tmp_path.iterdir()) == before

    def test_nan_can_be_kept_float(self, tmp_path: Path, able: Capabilities) -> None:
        self.needs_writing(able)
        if not able.on_the_fly:
            pytest.skip("nothing can be calibrated through a NaN weight")
        name, weight = "model.layers.1.self_attn.q_proj.weight", normal((64, 64))
        weight[3, 5] = float("nan")
        bad = write_tiny_llama(tmp_path / "bad", change={name: weight})
        options: dict[str, Any] = {**self.options, "non_finite": "keep"}
        report = quantmill.quantize(bad, tmp_path / "out", self.method, **options)
        assert any(item.code == "QM-WEIGHT-002" for item in sound(report.plan.findings))
        kept = stored(tmp_path / "out")[name]
        assert kept.dtype == torch.bfloat16 and int(kept.isnan().sum()) == 1

    def test_a_damaged_checkpoint_is_an_error_and_never_another_model(
        self, framework: None, tmp_path: Path, able: Capabilities
    ) -> None:
        self.needs_writing(able)
        source = write_tiny_llama(tmp_path / "one-layer", layers=1)
        written = self.write(source, tmp_path / "whole")
        whole, state = stored(written), quantmill.load(written).state_dict()
        inside = "model.layers.0.mlp.down_proj."
        module = {name: tensor for name, tensor in whole.items() if name.startswith(inside)}
        folder = tmp_path / "damaged"
        for what, tensors in damages(module).items():
            folder.mkdir()
            shutil.copy(written / "config.json", folder)
            rest = {name: tensor for name, tensor in whole.items() if name not in module}
            save_file({**rest, **tensors}, folder / "model.safetensors", {"format": "pt"})
            again, _ = attempt(lambda: quantmill.load(folder))
            assert again is None or same(again.state_dict(), state), what
            shutil.rmtree(folder)
