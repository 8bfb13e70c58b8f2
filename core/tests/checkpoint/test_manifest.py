"""The manifest tells whether a folder is what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmill.checkpoint.manifest import MANIFEST_NAME, make_manifest, verify
from quantmill.checkpoint.writer import CheckpointWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with CheckpointWriter(tmp_path / "out", manifest={"method": "some"}) as writer:
        writer.add("t", torch.arange(100))
        writer.write_json("config.json", {"a": 1})
        writer.commit()
    return tmp_path / "out"


def found(folder: Path) -> dict[str, str]:
    """Codes by the name they are about."""
    findings = list(verify(folder))
    assert all(item.cause and item.fix for item in findings)
    return {item.where: item.code for item in findings}


def test_an_untouched_folder(folder: Path) -> None:
    assert found(folder) == {}
    data = json.loads((folder / MANIFEST_NAME).read_text())
    assert set(data["files"]) == {"config.json", "model.safetensors"}
    assert data["versions"]["torch"] == torch.__version__
    assert data["method"] == "some"


def test_it_names_no_place_and_no_time(folder: Path, tmp_path: Path) -> None:
    text = (folder / MANIFEST_NAME).read_text()
    assert str(tmp_path) not in text
    (folder / MANIFEST_NAME).unlink()
    again = make_manifest(folder.rename(tmp_path / "elsewhere"), {"method": "some"})
    assert json.loads(text) == again


@pytest.mark.parametrize("keep_size", [True, False])
def test_a_changed_file(folder: Path, keep_size: bool) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if keep_size else data + b"\0")
    assert found(folder) == {"model.safetensors": "QM-CKPT-063"}


def test_a_missing_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert found(folder) == {"config.json": "QM-CKPT-062"}


def test_an_extra_file_is_only_a_warning(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    assert found(folder) == {"notes.txt": "QM-CKPT-064", "more": "QM-CKPT-064"}
    assert not verify(folder).errors


def test_all_of_it_at_once(folder: Path) -> None:
    (folder / "config.json").rename(folder / "renamed.json")
    (folder / "model.safetensors").write_bytes(b"")
    assert found(folder) == {
        "config.json": "QM-CKPT-062",
        "model.safetensors": "QM-CKPT-063",
        "renamed.json": "QM-CKPT-064",
    }


def test_a_folder_without_a_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    assert found(folder) == {str(folder): "QM-CKPT-060"}
    assert found(tmp_path / "nowhere") == {str(tmp_path / "nowhere"): "QM-CKPT-060"}


ENTRY = {"bytes": 1, "sha256": "00"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        {},
        {"files": None},
        {"files": ["config.json"]},
        {"files": {"config.json": None}},
        {"files": {"config.json": {"bytes": 1}}},
        {"files": {"config.json": {"sha256": "00"}}},
        {"files": {"config.json": {"bytes": float("inf"), "sha256": "00"}}},
        {"files": {"config.json": {"bytes": "1", "sha256": "00"}}},
        {"files": {"config.json": {"bytes": 1, "sha256": 0}}},
        {"files": {"../outside": ENTRY}},
        {"files": {"/outside": ENTRY}},
        {"files": {"\0": ENTRY}},
        {"files": {"x" * 5000: ENTRY}},
    ],
)
def test_a_malformed_manifest(folder: Path, data: Any) -> None:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    (folder / MANIFEST_NAME).write_bytes(raw)
    assert found(folder) == {MANIFEST_NAME: "QM-CKPT-061"}


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert found(folder) == {"model.safetensors": "QM-CKPT-031"}
