"""A checkpoint appears whole or not at all, and peers can read it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantmill.checkpoint.dtypes import BITS, torch_dtype
from quantmill.checkpoint.manifest import MANIFEST_NAME, verify
from quantmill.checkpoint.reader import TensorReader
from quantmill.checkpoint.source import open_source, read_headers
from quantmill.checkpoint.writer import CheckpointWriter
from quantmill.findings import QuantmillError

TENSORS = {
    "b.weight": torch.arange(60, dtype=torch.float32).reshape(6, 10),
    "a.weight": torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(-7, dtype=torch.int64),
    "codes": torch.arange(256).to(torch.uint8),
}


def write(folder: Path, **options: Any) -> Path:
    with CheckpointWriter(folder, **options) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.write_json("config.json", {"who": "é"})
        writer.write_bytes("tokenizer.model", b"\x00\x01")
        writer.commit()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail(folder: Path, error: type[BaseException]) -> None:
    """An error after some shards were written."""

    def work() -> None:
        with CheckpointWriter(folder, max_shard_bytes=1) as writer:
            for name, tensor in TENSORS.items():
                writer.add(name, tensor)
            assert len(list(folder.parent.glob(".*.partial-*/shard-*"))) > 2
            raise error

    with pytest.raises(error):
        work()


def code(caught: pytest.ExceptionInfo[QuantmillError]) -> str:
    (finding,) = caught.value.findings
    assert finding.cause and finding.fix
    return finding.code


def test_one_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", manifest={"method": "some"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(contents(folder)) == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        MANIFEST_NAME,
    }
    with safe_open(folder / "model.safetensors", "pt") as peer:
        assert peer.metadata() == {"format": "pt"}
        assert set(peer.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = peer.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert json.loads((folder / "config.json").read_text()) == {"who": "é"}
    assert (folder / "tokenizer.model").read_bytes() == b"\x00\x01"
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["method"] == "some" and not list(verify(folder))
    headers = read_headers(open_source(folder))
    with TensorReader(headers) as reader:
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in TENSORS.items())


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", max_shard_bytes=260)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(TENSORS)
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) == 3  # 240 | 40 + 0 + 8 | 256
    joined: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(folder / file)
        assert all(index["weight_map"][name] == file for name in part)
        joined |= part
    assert all(torch.equal(joined[name], tensor) for name, tensor in TENSORS.items())
    headers = read_headers(open_source(folder))
    assert set(headers.tensors) == set(TENSORS) and not list(headers.findings)
    assert not list(verify(folder))


def test_a_tensor_longer_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", max_shard_bytes=1)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    # The empty tensor and the scalar before which it stands: 0 bytes always fit.
    assert len(set(weight_map.values())) >= len(TENSORS) - 1


@pytest.mark.parametrize("limit", [10**9, 260])
def test_the_same_bytes_every_time(tmp_path: Path, limit: int) -> None:
    first = contents(write(tmp_path / "one", max_shard_bytes=limit))
    second = contents(write(tmp_path / "two", max_shard_bytes=limit))
    assert first == second


@pytest.mark.parametrize("dtype", [code for code in BITS if not code.startswith("F6")])
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    kind = torch_dtype(dtype)
    raw = torch.randint(0, 2, (4, 8 * kind.itemsize), dtype=torch.uint8)
    tensor = raw.view(kind)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", tensor)
        writer.commit()
    headers = read_headers(open_source(tmp_path / "out"))
    assert headers.tensors["t"].dtype == dtype
    with TensorReader(headers) as reader:
        found = reader.tensor("t")
    assert found.dtype == kind and found.shape == tensor.shape
    assert torch.equal(found.view(torch.uint8), raw)


def test_views_and_lazy_tensors(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    wave = torch.complex(base, base + 1)
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(5, 6),
        "conjugate": wave.conj(),
        "negative": wave.conj().imag,
        "parameter": torch.nn.Parameter(base),
    }
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.commit()
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach().resolve_conj().resolve_neg()), name


def test_long_names_open_a_new_shard_in_time(tmp_path: Path) -> None:
    # A header escapes each of these characters to six bytes; together they exceed its room.
    names = [f"{n:05}." + "層" * 150 for n in range(1500)]
    with CheckpointWriter(tmp_path / "out") as writer:
        for place, name in enumerate(names):
            writer.add(name, torch.tensor([place]))
        writer.commit()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 2
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert [found[name].item() for name in names] == list(range(1500))


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("again", torch.zeros(1), "QM-CKPT-055"),
        ("", torch.zeros(1), "QM-CKPT-057"),
        ("__metadata__", torch.zeros(1), "QM-CKPT-057"),
        ("\ud800", torch.zeros(1), "QM-CKPT-057"),
        ("x" * (1 << 20), torch.zeros(1), "QM-CKPT-057"),
        ("t", torch.zeros(1, dtype=torch.complex128), "QM-CKPT-056"),
        ("t", torch.zeros(2, 2).to_sparse(), "QM-CKPT-056"),
        ("t", torch.zeros(2, device="meta"), "QM-CKPT-056"),
    ],
)
def test_tensors_that_cannot_be_written(
    tmp_path: Path, name: str, tensor: torch.Tensor, expected: str
) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("again", torch.zeros(1))
        with pytest.raises(QuantmillError) as caught:
            writer.add(name, tensor)
        assert code(caught) == expected
        writer.add("t", torch.ones(2))  # A refusal leaves the writer as it was.
        writer.commit()
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"again", "t"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/x", "a\\b", "a\nb", "x" * 300])
def test_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        with pytest.raises(QuantmillError) as caught:
            writer.write_bytes(name, b"")
        assert code(caught) == "QM-CKPT-057"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", MANIFEST_NAME])
def test_a_file_written_twice(tmp_path: Path, name: str) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", {})
        with pytest.raises(QuantmillError) as caught:
            writer.write_json(name, {})
        assert code(caught) == "QM-CKPT-055"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("model.safetensors", 10**9),
        ("model-00001-of-00002.safetensors", 1),
        ("model.safetensors.index.json", 1),
    ],
)
def test_a_file_with_the_name_of_the_weights(tmp_path: Path, name: str, limit: int) -> None:
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=limit) as writer:
        writer.write_bytes(name, b"mine")
        writer.add("a", torch.zeros(1))
        writer.add("b", torch.zeros(1))
        with pytest.raises(QuantmillError) as caught:
            writer.commit()
        assert code(caught) == "QM-CKPT-055"
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", {})
        with pytest.raises(QuantmillError) as caught:
            writer.commit()
        assert code(caught) == "QM-CKPT-054"
    assert list(tmp_path.iterdir()) == []


def test_a_config_with_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(1))
        writer.write_json("config.json", {"odd": "\ud800", "é": 1})
        writer.commit()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"odd": "\ud800", "é": 1}


# -- the folder --------------------------------------------------------------------------------


def test_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    assert not list(verify(write(tmp_path / "empty")))
    assert not list(verify(write(tmp_path / "link")))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "link", "file"):
        with pytest.raises(QuantmillError) as caught:
            CheckpointWriter(tmp_path / taken)
        assert code(caught) == "QM-CKPT-050"
    assert (tmp_path / "file").read_text() == "mine"


def test_an_existing_empty_folder_survives_a_failure(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fail(tmp_path / "empty", ZeroDivisionError)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_folder_that_is_filled_meanwhile(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(1))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        with pytest.raises(QuantmillError) as caught:
            writer.commit()
        assert code(caught) == "QM-CKPT-050"
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "out",
        "out/precious",
    ]


def test_parents_are_made_and_taken_back(tmp_path: Path) -> None:
    fail(tmp_path / "a" / "b" / "out", ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []
    assert not list(verify(write(tmp_path / "a" / "b" / "out")))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QuantmillError) as caught, CheckpointWriter(tmp_path / "file" / "out"):
        pytest.fail("the folder was made inside a file")
    assert code(caught) == "QM-CKPT-053"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- failures in the middle --------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_end_before_commit_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_without_commit_there_is_no_folder(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def count_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    calls: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", calls.append)
        write(tmp_path / "count")
    return len(calls)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failure_at_any_step_of_commit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    steps = count_syncs(tmp_path, monkeypatch)
    assert steps == 6  # Four files, their folder, and after the rename the folder above.
    above = tmp_path / "above"
    above.mkdir()
    for step in range(steps):
        done: list[int] = []

        def sync(descriptor: int, step: int = step, done: list[int] = done) -> None:
            done.append(descriptor)
            if len(done) == step + 1:
                raise error

        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises((KeyboardInterrupt, QuantmillError)) as caught:
            write(above / "out")
        if isinstance(error, OSError):
            assert code(caught) == "QM-CKPT-053"  # type: ignore[arg-type]
        assert list(above.iterdir()) == []


def test_a_file_system_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", sync)
    assert not list(verify(write(tmp_path / "out")))


class FullDisk:
    """Files in folders that are being written take so many bytes in all, and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, error: int) -> None:
        self.room, self.error = room, error
        real = Path.open
        disk = self

        def limited(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            stream = real(path, mode, *arguments, **options)
            return _Limited(stream, disk) if "w" in mode and ".partial-" in str(path) else stream

        monkeypatch.setattr(Path, "open", limited)


class _Limited:
    def __init__(self, stream: Any, disk: FullDisk) -> None:
        self._stream, self._disk = stream, disk

    def write(self, data: Any) -> int:
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(self._disk.error, os.strerror(self._disk.error))
        return int(self._stream.write(data))

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.ENOSPC, "QM-CKPT-052"),
        (errno.EDQUOT, "QM-CKPT-052"),
        (errno.EIO, "QM-CKPT-053"),
        (errno.EROFS, "QM-CKPT-053"),
    ],
)
@pytest.mark.parametrize("room", [0, 250, 600, (1 << 20) + 600])
def test_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, expected: str, room: int
) -> None:
    FullDisk(monkeypatch, room, error)
    with pytest.raises(QuantmillError) as caught:
        write(tmp_path / "new" / "out")
    assert code(caught) == expected
    assert ("bytes are free" in str(caught.value)) == (expected == "QM-CKPT-052")
    assert list(tmp_path.iterdir()) == []


def test_notes_stand_in_the_metadata_of_every_shard(tmp_path: Path) -> None:
    def metadata(names: Any, notes: Any) -> dict[str, str]:
        return {**notes, "names": json.dumps(list(names))}

    options: dict[str, Any] = {"max_shard_bytes": 100, "metadata": metadata}
    with CheckpointWriter(tmp_path / "out", metadata_bytes=8000, **options) as writer:
        for name in ("one", "two"):
            writer.add(name, torch.zeros(16))
            writer.note({f"{name}.note": "x" * 3000})
        writer.commit()
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        with safe_open(path, framework="pt") as file:
            seen = file.metadata()
        assert sorted(seen) == ["format", "names", "one.note", "two.note"]
        assert seen["format"] == "pt" and json.loads(seen["names"]) == ["one", "two"]


def test_more_notes_than_were_foreseen_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with CheckpointWriter(tmp_path / "out", header_bytes=4096, metadata_bytes=10) as writer:
            writer.add("one", torch.zeros(16))
            writer.note({"one.note": "x" * 9000})
            writer.commit()

    with pytest.raises(QuantmillError):
        work()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from quantmill.checkpoint.writer import CheckpointWriter\n"
        "with CheckpointWriter(sys.argv[1]) as writer:\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    other = CheckpointWriter(tmp_path / "out")
    with other:
        assert not left.exists()
        (running,) = tmp_path.iterdir()
        # One that lives is left alone.
        with CheckpointWriter(tmp_path / "out") as writer:
            assert running.exists()
            writer.add("one", torch.zeros(16))
            writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
