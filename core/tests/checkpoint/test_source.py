"""Which files are a checkpoint, what joins them, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantmill
from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.checkpoint.source import FolderSource, HubSource, open_source, read_headers
from quantmill.findings import QuantmillError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "some"}')
    return path


def save(folder: Path, file: str, *names: str, value: float = 0.0) -> None:
    tensors = {name: torch.full((4,), value) for name in names}
    save_file(tensors, folder / file, metadata={"file": file})


def index(folder: Path, weight_map: Any, file: str = INDEX) -> None:
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(number: int, total: int, stem: str = "model") -> str:
    return f"{stem}-{number:05}-of-{total:05}.safetensors"


def headers(folder: Path) -> CheckpointHeaders:
    return read_headers(open_source(folder))


def notes(found: CheckpointHeaders) -> list[str]:
    assert all(item.cause and item.fix for item in found.findings)
    assert not found.findings.errors
    return [item.code for item in found.findings]


def refused(source: Path | str, *parts: str) -> set[str]:
    """The codes of the errors; ``parts`` must stand in the message."""
    with pytest.raises(QuantmillError) as caught:
        read_headers(open_source(source))
    assert all(item.cause and item.fix for item in caught.value.findings)
    for part in parts:
        assert part in str(caught.value)
    return {item.code for item in caught.value.findings}


# -- what is read ------------------------------------------------------------------------------


def test_one_file(folder: Path) -> None:
    save(folder, "model.safetensors", "a", "b")
    (folder / "generation_config.json").write_text('{"top_p": 1}')
    found = headers(folder)
    assert set(found.tensors) == {"a", "b"} and found.config == {"model_type": "some"}
    assert found.generation_config == {"top_p": 1}
    assert found.metadata == {"file": "model.safetensors"}
    assert found.files == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    assert found.total_bytes == 32 and notes(found) == []
    assert found.source.describe() == str(folder)


def test_shards_and_their_index(folder: Path) -> None:
    save(folder, shard(1, 2), "a", "b")
    save(folder, shard(2, 2), "c")
    index(folder, {"a": shard(1, 2), "b": shard(1, 2), "c": shard(2, 2)})
    save(folder, "consolidated.safetensors", "something.else")
    found = headers(folder)
    assert {name: item.file for name, item in found.tensors.items()} == {
        "a": shard(1, 2),
        "b": shard(1, 2),
        "c": shard(2, 2),
    }
    assert found.metadata == {"file": shard(1, 2)} and notes(found) == []


def test_an_index_of_one_file(folder: Path) -> None:
    save(folder, "model.safetensors", "a")
    index(folder, {"a": "model.safetensors"})
    assert set(headers(folder).tensors) == {"a"}


def test_one_file_of_a_folder(folder: Path) -> None:
    save(folder, shard(1, 2), "a")
    save(folder, "other.safetensors", "b")
    index(folder, {"a": shard(1, 2), "c": shard(2, 2)})
    found = headers(folder / "other.safetensors")
    assert set(found.tensors) == {"b"} and found.config == {"model_type": "some"}
    assert found.source.describe() == str(folder / "other.safetensors")
    assert set(headers(folder / shard(1, 2)).tensors) == {"a"}


def test_a_lone_file_of_any_name(folder: Path) -> None:
    save(folder, "weights.safetensors", "a")
    assert set(headers(folder).tensors) == {"a"}
    # A file of the usual name is meant where there is one.
    save(folder, "model.safetensors", "b")
    assert set(headers(folder).tensors) == {"b"}


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "some.fp16"])
def test_each_stem(folder: Path, stem: str) -> None:
    save(folder, shard(1, 2, stem), "a")
    save(folder, shard(2, 2, stem), "b")
    index(
        folder, {"a": shard(1, 2, stem), "b": shard(2, 2, stem)}, f"{stem}.safetensors.index.json"
    )
    found = headers(folder)
    assert set(found.tensors) == {"a", "b"} and notes(found) == []


def test_numbered_shards_without_an_index(folder: Path) -> None:
    save(folder, shard(2, 2), "b")
    save(folder, shard(1, 2), "a")
    found = headers(folder)
    assert list(found.tensors) == ["a", "b"] and notes(found) == ["QM-CKPT-013"]


def test_a_single_numbered_shard_needs_no_index(folder: Path) -> None:
    save(folder, shard(1, 1), "a")
    found = headers(folder)
    assert set(found.tensors) == {"a"} and notes(found) == []


def test_warnings_reach_the_user(folder: Path) -> None:
    save(folder, shard(1, 2), "a")
    save(folder, shard(2, 2), "b")
    found = quantmill.inspect(folder).findings
    assert [item.code for item in found.warnings] == ["QM-CKPT-013"]


def test_a_tensor_that_the_index_does_not_name(folder: Path) -> None:
    save(folder, shard(1, 2), "a", "more")
    save(folder, shard(2, 2), "b")
    index(folder, {"a": shard(1, 2), "b": shard(2, 2)})
    found = headers(folder)
    assert set(found.tensors) == {"a", "b", "more"} and notes(found) == ["QM-CKPT-010"]


def test_a_copy_of_a_tensor_is_not_what_the_index_means(folder: Path) -> None:
    save(folder, shard(1, 2), "a", "b", value=1.0)
    save(folder, shard(2, 2), "a", "b", value=2.0)
    index(folder, {"a": shard(1, 2), "b": shard(2, 2)})
    found = headers(folder)
    assert {name: item.file for name, item in found.tensors.items()} == {
        "a": shard(1, 2),
        "b": shard(2, 2),
    }
    assert notes(found) == ["QM-CKPT-010", "QM-CKPT-010"]


# -- what is refused ---------------------------------------------------------------------------


def test_several_files_and_nothing_that_joins_them(folder: Path) -> None:
    save(folder, "one.safetensors", "a")
    save(folder, "two.safetensors", "b")
    found = refused(folder, "one.safetensors", "two.safetensors")
    assert found == {"QM-CKPT-012"}


def test_several_stems(folder: Path) -> None:
    save(folder, "model.safetensors", "a")
    save(folder, "diffusion_pytorch_model.safetensors", "b")
    assert refused(folder, "model.safetensors") == {"QM-CKPT-012"}
    assert set(headers(folder / "model.safetensors").tensors) == {"a"}


def test_an_index_and_a_file_that_it_does_not_name(folder: Path) -> None:
    save(folder, shard(1, 1), "a")
    save(folder, "model.safetensors", "b")
    index(folder, {"a": shard(1, 1)})
    assert refused(folder, INDEX, "model.safetensors") == {"QM-CKPT-012"}


def test_numbered_shards_of_two_sets(folder: Path) -> None:
    save(folder, shard(1, 2), "a")
    save(folder, shard(1, 3), "a")
    assert refused(folder) == {"QM-CKPT-012"}


def test_a_missing_shard(folder: Path) -> None:
    save(folder, shard(1, 2), "a")
    index(folder, {"a": shard(1, 2), "b": shard(2, 2)})
    assert refused(folder, shard(2, 2)) == {"QM-CKPT-007"}
    (folder / INDEX).unlink()
    assert refused(folder, shard(2, 2), "1 of 2") == {"QM-CKPT-007"}


def test_the_same_tensor_in_two_shards_without_an_index(folder: Path) -> None:
    save(folder, shard(1, 2), "a", "b")
    save(folder, shard(2, 2), "b", "c")
    assert refused(folder, "'b'", shard(1, 2), shard(2, 2)) == {"QM-CKPT-014"}


def test_a_tensor_that_is_not_where_the_index_says(folder: Path) -> None:
    save(folder, shard(1, 2), "a", "b")
    save(folder, shard(2, 2), "c")
    index(folder, {"a": shard(1, 2), "b": shard(2, 2), "c": shard(2, 2), "d": shard(2, 2)})
    assert refused(folder, "2 tensors", shard(2, 2)) == {"QM-CKPT-009"}


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
        "x" * 5000 + ".safetensors",
    ],
)
def test_an_index_that_names_what_is_no_file_of_the_folder(folder: Path, name: str) -> None:
    save(folder.parent, "outside.safetensors", "b")
    save(folder, shard(1, 2), "a")
    index(folder, {"a": shard(1, 2), "b": name})
    assert refused(folder) == {"QM-CKPT-006"}


def test_an_index_that_names_other_kinds_of_files(folder: Path) -> None:
    index(folder, {"a": "pytorch_model.bin", "b": "config.json"})
    assert refused(folder, "pytorch_model.bin", "config.json") == {"QM-CKPT-003", "QM-CKPT-008"}


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], "model.safetensors", {"a": None}, {"a": 1}, {"a": ["x"]}]
)
def test_a_malformed_weight_map(folder: Path, weight_map: Any) -> None:
    index(folder, weight_map)
    assert refused(folder, INDEX) == {"QM-CKPT-008"}


JUNK = [b"", b"{", b"[]", b"\xff\xfe\xfa", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"7"]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", [INDEX, "config.json", "generation_config.json"])
def test_a_malformed_json_file(folder: Path, name: str, junk: bytes) -> None:
    save(folder, "model.safetensors", "a")
    (folder / name).write_bytes(junk)
    assert refused(folder, name) == {"QM-CKPT-008" if name == INDEX else "QM-CKPT-011"}


def test_a_json_file_of_absurd_length_is_not_read(folder: Path) -> None:
    save(folder, "model.safetensors", "a")
    with (folder / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    assert refused(folder, "config.json") == {"QM-CKPT-011"}


def test_every_problem_of_every_file_at_once(folder: Path) -> None:
    save(folder, shard(1, 4), "a")
    (folder / shard(2, 4)).write_bytes(b"abc")
    (folder / shard(3, 4)).write_bytes(b"\xff" * 100)
    index(folder, {name: shard(n, 4) for n, name in enumerate("abcd", 1)})
    (folder / "config.json").write_text("{")
    found = refused(folder, *(shard(n, 4) for n in (2, 3, 4)))
    assert found == {"QM-CKPT-011", "QM-CKPT-020", "QM-CKPT-021", "QM-CKPT-007"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "v1.ckpt"])
def test_pickles(folder: Path, name: str) -> None:
    torch.save({"a": torch.zeros(1)}, folder / name)
    assert refused(folder, "weights_only=True") == {"QM-CKPT-003"}
    assert refused(folder / name, "weights_only=True") == {"QM-CKPT-003"}
    save(folder, "model.safetensors", "a")
    assert set(headers(folder).tensors) == {"a"}


def test_a_folder_without_weights(folder: Path) -> None:
    assert refused(folder) == {"QM-CKPT-002"}
    (folder / "some.Q4_K.gguf").write_bytes(b"GGUF")
    assert refused(folder, "some.Q4_K.gguf") == {"QM-CKPT-002"}


def test_a_file_that_no_plugin_reads(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert refused(folder / "notes.txt") == {"QM-CKPT-005"}


def test_a_folder_of_a_weight_files_name(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    assert refused(folder) == {"QM-CKPT-002"}


# -- specifications ----------------------------------------------------------------------------


def test_a_hub_id() -> None:
    found = open_source("org/name@refs/pr/1")
    assert isinstance(found, HubSource)
    assert (found.repo_id, found.revision) == ("org/name", "refs/pr/1")
    assert open_source("org/na.me_-1").describe() == "org/na.me_-1@main"


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("./org/name", "QM-CKPT-001"),
        ("../name", "QM-CKPT-001"),
        ("/no/such/folder", "QM-CKPT-001"),
        ("folder/model.safetensors", "QM-CKPT-001"),
        ("folder/model.gguf", "QM-CKPT-001"),
        ("name", "QM-CKPT-004"),
        ("a/b/c", "QM-CKPT-004"),
        ("org/name@", "QM-CKPT-004"),
        ("org/name with spaces", "QM-CKPT-004"),
        ("", "QM-CKPT-002"),
        ("nul\0", "QM-CKPT-004"),
        ("x" * 5000, "QM-CKPT-001"),
    ],
)
def test_what_is_no_source(
    spec: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(spec) == {code}


# -- a folder as a source ----------------------------------------------------------------------


def test_identity_changes_with_the_weights(folder: Path) -> None:
    save(folder, "model.safetensors", "a")
    source = FolderSource(folder)
    before = source.identity()
    (folder / "README.md").write_text("more")
    assert source.identity() == before
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert source.identity() != before


def test_a_folder_read_by_ranges(folder: Path) -> None:
    (folder / "x").write_bytes(bytes(range(10)))
    source = FolderSource(folder)
    assert source.names() == ["config.json", "x"] and source.size("x") == 10
    assert source.read("x", 3, 6) == b"\3\4\5" and source.read("x", 8, 100) == b"\x08\x09"
    assert source.local_path("x") == folder / "x"
    for strange in ("", "\0", "x" * 5000, "\ud800", "y", "."):
        assert not source.exists(strange)


def failing(*arguments: Any, **options: Any) -> Any:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("os.scandir", lambda source: source.names()),
        ("pathlib.Path.open", lambda source: source.read("config.json", 0, 1)),
        ("pathlib.Path.stat", lambda source: source.size("config.json")),
    ],
)
def test_a_folder_that_cannot_be_read(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    call: Callable[[FolderSource], object],
) -> None:
    monkeypatch.setattr(place, failing)
    with pytest.raises(QuantmillError) as caught:
        call(FolderSource(folder))
    monkeypatch.undo()
    (finding,) = caught.value.findings
    assert finding.code == "QM-CKPT-031" and "Permission denied" in finding.cause


def test_a_shard_that_cannot_be_read_is_one_problem_of_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, shard(1, 2), "a")
    (folder / shard(2, 2)).write_bytes(b"abc")
    real = Path.open

    def partly(path: Path, *arguments: Any, **options: Any) -> Any:
        return failing() if path.name == shard(1, 2) else real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", partly)
    assert refused(folder) == {"QM-CKPT-031", "QM-CKPT-020"}


def test_a_module_is_no_source() -> None:
    with pytest.raises(QuantmillError, match="quantize_model") as caught:
        quantmill.load(torch.nn.Linear(8, 8))  # type: ignore[arg-type]
    assert caught.value.findings[0].code == "QM-CKPT-018"
