"""Wrong input: a clear error with cause and fix, a non-zero exit, nothing written, no traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill.testing import write_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "sharded", shards=3)


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from quantmill.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def codes(caught: pytest.ExceptionInfo[QuantmillError]) -> set[str]:
    assert all(item.cause and item.fix for item in caught.value.findings)
    return {item.code for item in caught.value.findings}


def refused(source: Path, method: Any, **options: Any) -> tuple[set[str], str]:
    """Quantize must fail and leave nothing; the codes and the message."""
    out = source.parent / "refused"
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(QuantmillError) as caught:
        quantmill.quantize(source, out, method, **options)
    assert sorted(path.name for path in source.parent.iterdir()) == before
    return codes(caught), str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- METHOD ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nf5", "bnb-nf5", "no-such-method"])
def test_an_unknown_method(folder: Path, method: str) -> None:
    found, message = refused(folder, method)
    assert found == {"QM-SELECT-001"} and method in message


def test_a_misspelt_field_is_suggested(folder: Path) -> None:
    found, message = refused(folder, {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"})
    assert found == {"QM-CONFIG-001"}
    assert "bnb_4bit_quant_typ: did you mean bnb_4bit_quant_type?" in message


def test_an_invalid_value(folder: Path) -> None:
    found, message = refused(folder, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"})
    assert found == {"QM-CONFIG-002"} and "nf5" in message


def test_four_and_eight_bits_together(folder: Path) -> None:
    found, message = refused(folder, {"load_in_4bit": True, "load_in_8bit": True})
    assert "QM-CONFIG-003" in found and "load_in_4bit" in message and "load_in_8bit" in message


@pytest.mark.parametrize("method", [{}, {"quant_method": "bitsandbytes"}, None])
def test_nothing_set_at_all(folder: Path, method: Any) -> None:
    found, _ = refused(folder, method)
    assert found & {"QM-CONFIG-002", "QM-CONFIG-010", "QM-SELECT-003"}


def test_every_problem_of_a_config_at_once(folder: Path) -> None:
    found, message = refused(
        folder,
        {"load_in_4bit": True, "load_in_8bit": True, "bnb_4bit_quant_type": "nf5", "nonsense": 1},
    )
    assert found >= {"QM-CONFIG-001", "QM-CONFIG-002", "QM-CONFIG-003"}
    assert "nonsense" in message


def test_an_unknown_quant_method(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "quip-sharp", "bits": 2})
    with pytest.raises(QuantmillError) as caught:
        quantmill.load(folder)
    assert codes(caught) == {"QM-CONFIG-010"} and "quip-sharp" in str(caught.value)


def test_a_user_who_contradicts_the_checkpoint_sees_the_difference(folder: Path) -> None:
    out = folder.parent / "nf4"
    quantmill.quantize(folder, out, "bnb-nf4")
    with pytest.raises(FindingsError) as caught:
        quantmill.load(out, "bnb-int8")
    assert codes(caught) == {"QM-CONFIG-011"}
    assert "load_in_8bit" in str(caught.value) and "True" in str(caught.value)


# -- patterns ----------------------------------------------------------------------------------


def test_a_skip_that_matches_nothing(folder: Path) -> None:
    found, message = refused(folder, "bnb-nf4", skip=["model.layers.0.mlp.dwn_proj"])
    assert "QM-TARGET-010" in found and "did you mean model.layers.0.mlp.down_proj" in message
    plan = quantmill.plan(folder, "bnb-nf4", skip=["nothing_here"], allow_unmatched=True)
    assert not plan.findings.errors


def test_an_invalid_regex(folder: Path) -> None:
    found, message = refused(folder, "bnb-nf4", skip=["re:(unclosed"])
    assert len(found) == 1 and "position" in message


# -- checkpoints -------------------------------------------------------------------------------


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    _, message = refused(sharded, "bnb-nf4")
    assert "model-00002-of-00003.safetensors" in message


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/x.safetensors", "a/b.safetensors"]
)
def test_an_index_that_names_a_path_outside(sharded: Path, name: str) -> None:
    path = sharded / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(data))
    _, message = refused(sharded, "bnb-nf4")
    assert name in message


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1, -1000])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    _, message = refused(folder, "bnb-nf4")
    assert "model.safetensors" in message


@pytest.mark.parametrize("length", [2**63, 2**40, 0, 1])
def test_a_header_of_absurd_length(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, "bnb-nf4")


def test_shapes_that_contradict_the_config(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    found, message = refused(folder, "bnb-nf4")
    assert "QM-ARCH-003" in found and "mlp.down_proj" in message


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    edit_config(folder, num_hidden_layers=3)
    found, message = refused(folder, "bnb-nf4")
    assert "QM-ARCH-004" in found and "model.layers.2." in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("preset", ["bnb-nf4", "bnb-int8"])
def test_a_weight_that_is_not_finite(tmp_path: Path, value: float, preset: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(128, 64).to(torch.bfloat16)
    weight[70, 9] = value
    folder = write_tiny_llama(tmp_path / "model", change={name: weight})
    found, message = refused(folder, preset)
    assert found == {"QM-WEIGHT-001"} and name in message and "[70, 9]" in message


def test_a_weight_that_is_not_finite_can_be_kept(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(128, 64).to(torch.bfloat16)
    weight[70, 9] = float("nan")
    folder = write_tiny_llama(tmp_path / "model", change={name: weight})
    report = quantmill.quantize(folder, tmp_path / "kept", "bnb-nf4", non_finite="keep")
    assert any(item.code == "QM-WEIGHT-002" for item in report.plan.findings)


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    folder = tmp_path / "pickle"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    _, message = refused(folder, "bnb-nf4")
    assert "safetensors" in message and "weights_only=True" in message


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(QuantmillError):
        quantmill.plan(tmp_path / "nowhere", "bnb-nf4")


# -- output ------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(QuantmillError) as caught:
        quantmill.quantize(folder, out, "bnb-nf4")
    assert codes(caught) == {"QM-CKPT-050"}
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_a_disk_that_fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found, message = refused(folder, "bnb-nf4")
    assert found == {"QM-CKPT-052"} and "free" in message


def test_a_real_small_disk(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(QuantmillError) as caught:
            quantmill.quantize(folder, small / "out", "bnb-nf4")
        assert codes(caught) & {"QM-DISK-001", "QM-CKPT-052", "QM-CKPT-051"}
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("when", ["quantizing", "committing"])
def test_an_interrupt_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    if when == "committing":
        monkeypatch.setattr(os, "fsync", interrupt)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        quantmill.quantize(
            folder,
            tmp_path / "out",
            "bnb-nf4",
            progress=interrupt if when == "quantizing" else None,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_control_c_in_a_running_save(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", hidden=512, inner=2048, layers=8)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from quantmill.cli import main; main()",
            "quantize",
            str(folder),
            str(tmp_path / "out"),
            "bnb-nf4",
            "--quiet",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the save was faster than the signal")
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nf5"], "nf5"),
        (['{"load_in_4bit": true, "bnb_4bit_quant_typ": "nf4"}'], "bnb_4bit_quant_type"),
        (["bnb-nf4", "--skip", "nothing_here"], "nothing_here"),
        (["bnb-nf4", "--device", "cuda:7"], "cuda:7"),
    ],
)
def test_the_command_line_says_it_without_a_traceback(
    folder: Path, arguments: list[str], word: str
) -> None:
    done = run("quantize", folder, folder.parent / "out", *arguments)
    assert done.returncode == 1
    assert word in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert not (folder.parent / "out").exists()


def test_errors_as_json(folder: Path) -> None:
    done = run("plan", folder, "nf5", "--json")
    assert done.returncode == 1
    data = json.loads(done.stdout)
    assert data["error"] is True and data["findings"][0]["code"] == "QM-SELECT-001"


def test_wrong_usage_exits_with_2() -> None:
    assert run("plan").returncode == 2
    done = run("plna")
    assert done.returncode == 2 and "plan" in done.stderr
