"""A Hub repository is read by ranges of one commit, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

import quantmill
from quantmill.checkpoint.hub import HubSource
from quantmill.checkpoint.reader import TensorReader
from quantmill.checkpoint.source import open_source, read_headers
from quantmill.testing import write_tiny_llama

Failed = Callable[..., str]

REPO = "org/name"
MIB = 1 << 20
INDEX = "model.safetensors.index.json"
WEIGHTS = {"a": torch.arange(MIB, dtype=torch.int32), "b": torch.ones(3, 5)}
MODEL = {"config.json": b'{"model_type": "some"}', "model.safetensors": save(WEIGHTS)}


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def headers(spec: str = REPO) -> Any:
    return read_headers(open_source(spec))


# -- what is transferred -----------------------------------------------------------------------


def test_only_headers_are_transferred(hub: Any, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", hidden=512, inner=1024, vocab=2048, shards=3)
    commit = hub.push_folder(REPO, folder)
    local = read_headers(open_source(folder))
    found = quantmill.inspect(f"{REPO}@main")
    assert {item["name"] for item in found.tensors} == set(local.tensors)
    assert found.totals["bytes"] == local.total_bytes > 10 * MIB
    assert found.source == f"{REPO}@main" and not found.findings.errors
    for file in local.files:
        data = (folder / file).read_bytes()
        requests = hub.of(file)
        assert len(data) > 3 * MIB and len(requests) == 1
        assert sum(item.sent for item in requests) < header_bytes(data) + 128 * 1024
    files = [item for item in hub.log if "/resolve/" in item.path]
    assert files and all(item.range and item.method == "GET" for item in files)
    assert all(f"/resolve/{commit}/" in item.path for item in files)
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))


def test_a_plan_transfers_only_headers(hub: Any, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    folder = write_tiny_llama(tmp_path / "model", hidden=512, inner=1024, vocab=2048)
    hub.push_folder(REPO, folder)
    plan = quantmill.plan(f"{REPO}@main", "bnb-nf4")
    there = quantmill.plan(folder, "bnb-nf4")
    assert plan.totals == there.totals and not plan.findings.errors
    size = (folder / "model.safetensors").stat().st_size
    sent = sum(item.sent for item in hub.of(".safetensors"))
    assert size > 8 * MIB and 0 < sent < 2 * 64 * 1024


def test_a_long_header_takes_a_second_request(hub: Any) -> None:
    many = {f"layer.{n}.{'x' * 80}": torch.zeros(1) for n in range(2000)}
    data = save({**many, "big": torch.zeros(2 * MIB)})
    hub.push(REPO, {"model.safetensors": data})
    assert set(headers().tensors) == {*many, "big"}
    first, second = hub.of(".safetensors")
    assert header_bytes(data) > 2 * 64 * 1024
    assert first.sent == 64 * 1024 and first.sent + second.sent == header_bytes(data)


def test_small_files_take_one_request_each(hub: Any) -> None:
    index = {"weight_map": {f"t{n}": "model-00001-of-00001.safetensors" for n in range(5000)}}
    data = save({f"t{n}": torch.zeros(0) for n in range(5000)})
    raw = json.dumps(index).encode()
    assert len(raw) > 3 * 64 * 1024
    files = {INDEX: raw, "model-00001-of-00001.safetensors": data, "empty.json": b""}
    hub.push(REPO, files)
    found = headers()
    assert len(found.tensors) == 5000
    assert [item.sent for item in hub.of(INDEX)] == [len(raw)]
    assert found.source.read("empty.json", 0, 100) == b""
    assert hub.of("empty.json") == []


def test_headers_are_asked_for_once(hub: Any) -> None:
    hub.push(REPO, MODEL)
    source = open_source(REPO)
    first = read_headers(source)
    before = len(hub.log)
    first.config["model_type"] = "edited"
    second = read_headers(source)
    assert len(hub.log) == before
    assert second.tensors == first.tensors and second.config == {"model_type": "some"}


def test_ranges_of_a_file(hub: Any) -> None:
    hub.push(REPO, MODEL)
    source = HubSource(REPO)
    data = MODEL["model.safetensors"]
    for start, stop in ((0, 8), (8, 100), (60_000, 70_000), (MIB, MIB + 5), (len(data) - 3, 10**9)):
        assert source.read("model.safetensors", start, stop) == data[start:stop]
    assert source.read("model.safetensors", 5, 5) == b""
    assert source.size("model.safetensors") == len(data)


def test_a_server_that_ignores_ranges(hub: Any, failed: Failed) -> None:
    data = save({"a": torch.zeros(16 * MIB), "b": torch.ones(2)})
    hub.push(REPO, {"model.safetensors": data})
    hub.ignore_ranges = True
    found = headers()
    assert set(found.tensors) == {"a", "b"}
    # What is sent beyond the wanted bytes lies in the buffers of the connection.
    assert sum(item.sent for item in hub.of(".safetensors")) < len(data) // 3
    assert found.source.read("model.safetensors", 500_000, 500_009) == data[500_000:500_009]
    read = lambda: found.source.read("model.safetensors", 2 * MIB, 2 * MIB + 8)  # noqa: E731
    assert failed(read, "whole file") == "QM-CKPT-044"


def test_a_revision_is_resolved_once(hub: Any) -> None:
    old = hub.push(REPO, MODEL)
    source = HubSource(REPO)
    assert source.exists("config.json") and source.commit == old
    new = hub.push(REPO, {"config.json": b'{"model_type": "newer"}', "other.safetensors": b"?"})
    found = read_headers(source)
    assert found.config == {"model_type": "some"} and set(found.tensors) == set(WEIGHTS)
    assert source.identity() == f"{REPO}@{old}" and source.describe() == f"{REPO}@main"
    assert len([item for item in hub.log if item.path.startswith("api/")]) == 1
    assert HubSource(REPO).identity() == f"{REPO}@{new}"
    assert read_headers(open_source(f"{REPO}@{old}")).config == {"model_type": "some"}


def test_only_files_at_the_top_are_the_checkpoint(hub: Any) -> None:
    hub.push(REPO, {**MODEL, "onnx/model.safetensors": b"?", "original/x.safetensors": b"?"})
    assert HubSource(REPO).names() == ["config.json", "model.safetensors"]
    assert set(headers().tensors) == set(WEIGHTS)


@pytest.mark.parametrize("ignore_ranges", [False, True])
def test_sizes_that_are_not_listed(hub: Any, ignore_ranges: bool) -> None:
    hub.push(REPO, MODEL)
    hub.list_sizes, hub.ignore_ranges = False, ignore_ranges
    found = headers()
    assert found.files == {"model.safetensors": len(MODEL["model.safetensors"])}
    assert len(hub.of(".safetensors")) == 1


def test_redirects_to_another_host_do_not_carry_the_token(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(REPO, MODEL)
    hub.token, hub.redirect = "hf_secret", True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = open_source(REPO)
    assert set(read_headers(source).tensors) == set(WEIGHTS)
    assert source.local_path("model.safetensors").read_bytes() == MODEL["model.safetensors"]
    kept = [item for item in hub.log if item.path.startswith("cdn/")]
    assert kept and all(item.host.startswith("localhost") for item in kept)
    assert all(item.authorization is None for item in kept)
    others = [item for item in hub.log if not item.path.startswith("cdn/")]
    assert {item.authorization for item in others} == {"Bearer hf_secret"}


# -- downloads and the cache -------------------------------------------------------------------


def test_weights_are_downloaded_when_they_are_read(hub: Any) -> None:
    commit = hub.push(REPO, MODEL)
    with TensorReader(headers()) as reader:
        for name, tensor in WEIGHTS.items():
            assert torch.equal(reader.tensor(name), tensor)
            assert torch.equal(reader.mapped(name), tensor)
    whole = [
        item for item in hub.of(".safetensors") if item.sent == len(MODEL["model.safetensors"])
    ]
    assert len(whole) == 1 and f"/resolve/{commit}/" in whole[0].path


def test_what_is_cached_is_not_transferred_again(hub: Any) -> None:
    hub.push(REPO, MODEL)
    first = open_source(REPO)
    path = first.local_path("model.safetensors")
    before = len(hub.of(".safetensors"))
    second = open_source(REPO)
    assert set(read_headers(second).tensors) == set(WEIGHTS)
    assert second.local_path("model.safetensors") == path
    assert second.read("model.safetensors", MIB, MIB + 9) == path.read_bytes()[MIB : MIB + 9]
    assert len(hub.of(".safetensors")) == before


def test_a_branch_that_moves_between_header_and_download(hub: Any) -> None:
    hub.push(REPO, MODEL)
    found = headers()
    hub.push(REPO, {**MODEL, "model.safetensors": save({"a": torch.zeros(9)})})
    with TensorReader(found) as reader:
        assert torch.equal(reader.tensor("a"), WEIGHTS["a"])


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", ["main", "dev", "commit"])
def test_offline_with_a_complete_cache(
    hub: Any, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    commit = hub.push(REPO, MODEL, branch="dev" if revision == "dev" else "main")
    spec = f"{REPO}@{commit if revision == 'commit' else revision}"
    online = open_source(spec)
    for name in MODEL:
        online.local_path(name)
    offline(monkeypatch)
    before = len(hub.log)
    found = headers(spec)
    assert set(found.tensors) == set(WEIGHTS) and found.config == {"model_type": "some"}
    assert found.source.offline and found.source.identity() == online.identity()
    with TensorReader(found) as reader:
        assert torch.equal(reader.tensor("a"), WEIGHTS["a"])
    assert len(hub.log) == before


def test_offline_with_an_incomplete_cache(
    hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"a": files[0], "b": files[1]}}
    parts = [save({name: WEIGHTS[name]}) for name in "ab"]
    hub.push(REPO, {INDEX: json.dumps(index).encode(), **dict(zip(files, parts, strict=True))})
    online = open_source(REPO)
    online.local_path(INDEX)
    online.local_path(files[0])
    offline(monkeypatch)
    assert failed(headers, files[1], "HF_HUB_OFFLINE") == "QM-CKPT-043"
    source = open_source(REPO)
    assert failed(lambda: source.local_path(files[1]), files[1]) == "QM-CKPT-043"
    assert failed(lambda: source.size("config.json")) == "QM-CKPT-043"


@pytest.mark.parametrize("other", [False, True])
def test_offline_without_a_cache(
    hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    hub.push(REPO, MODEL)
    if other:  # Another revision is no substitute.
        open_source(f"{REPO}@{hub.push(REPO, MODEL, branch='x')}").local_path("config.json")
    offline(monkeypatch)
    before = len(hub.log)
    assert failed(headers, f"{REPO}@main", "HF_HUB_OFFLINE") == "QM-CKPT-043"
    assert len(hub.log) == before


def test_the_network_is_switched_off_after_the_headers(
    hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(REPO, MODEL)
    source = open_source(REPO)
    assert source.exists("config.json")
    offline(monkeypatch)
    assert failed(lambda: source.local_path("model.safetensors")) == "QM-CKPT-043"


# -- as a user does it -------------------------------------------------------------------------


def test_the_environment_decides(hub: Any, tmp_path: Path) -> None:
    """``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE``, in a fresh process."""
    hub.push_folder(REPO, write_tiny_llama(tmp_path / "model", hidden=256, inner=512, vocab=2048))
    hub.token = "hf_secret"
    code = (
        "import sys, quantmill\n"
        "from quantmill.checkpoint.source import open_source\n"
        "try:\n"
        "    print(quantmill.inspect('org/name@main').totals['tensors'])\n"
        "    if 'download' in sys.argv:\n"
        "        source = open_source('org/name@main')\n"
        "        for name in source.names(): source.local_path(name)\n"
        "except quantmill.QuantmillError as error:\n"
        "    print(error.findings[0].code)\n"
        "assert 'transformers' not in sys.modules\n"
    )

    def run(*arguments: str, **changes: str) -> str:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "*",
            **changes,
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run(HF_HUB_OFFLINE="1") == "QM-CKPT-043"
    assert hub.log == []
    assert run("download", HF_TOKEN="hf_secret") == "21"
    ranges = [item for item in hub.of(".safetensors") if item.range]
    assert ranges and ranges[0].sent == 64 * 1024
    before = len(hub.log)
    assert run(HF_HUB_OFFLINE="1") == "21"
    assert len(hub.log) == before


def test_the_helper_files_are_what_safetensors_writes(hub: Any, tmp_path: Path) -> None:
    """The bytes that the tests above serve are those of a real file."""
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
