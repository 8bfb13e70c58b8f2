"""Whatever a Hub or the network does wrong becomes one finding with its cause and its fix."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from quantmill.checkpoint.hubcalls import HubError
from quantmill.checkpoint.source import open_source, read_headers

Failed = Callable[..., str]

REPO = "org/name"
WEIGHTS = {"a": torch.arange(100_000, dtype=torch.int32), "b": torch.ones(3, 5)}
MODEL = {"config.json": b'{"model_type": "some"}', "model.safetensors": save(WEIGHTS)}


def headers(spec: str = REPO) -> Any:
    return read_headers(open_source(spec))


def test_what_is_not_there(hub: Any, failed: Failed) -> None:
    hub.push(REPO, MODEL)
    assert failed(lambda: headers("org/other"), "org/other@main", "HF_TOKEN") == "QM-CKPT-041"
    assert failed(lambda: headers(f"{REPO}@nope"), "follows the @") == "QM-CKPT-041"
    source = open_source(REPO)
    for call in (source.size, source.local_path, lambda name: source.read(name, 0, 1)):
        assert failed(lambda call=call: call("nope.json"), "nope.json") == "QM-CKPT-041"
    del hub.commits[REPO][source.commit]["config.json"]
    assert failed(lambda: read_headers(source), "config.json") == "QM-CKPT-041"


def test_an_id_that_the_hub_does_not_allow(hub: Any, failed: Failed) -> None:
    assert failed(lambda: headers("org/na--me"), "org/name") == "QM-CKPT-004"
    assert hub.log == []


def test_a_private_repository(hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(REPO, MODEL)
    hub.token = "hf_right"
    assert failed(headers, "HF_TOKEN") == "QM-CKPT-041"  # A Hub does not say that it is there.
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert set(headers().tensors) == set(WEIGHTS)


def test_a_gated_repository(hub: Any, failed: Failed) -> None:
    files = [f"model-{n:05}-of-00009.safetensors" for n in range(1, 10)]
    hub.push(REPO, {name: save({name: torch.zeros(1)}) for name in files})
    hub.gated = True
    assert failed(headers, "access", "HF_TOKEN") == "QM-CKPT-042"
    source = open_source(REPO)
    assert failed(lambda: source.local_path(files[0]), "access") == "QM-CKPT-042"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "QM-CKPT-042"),
        (404, "QM-CKPT-041"),
        (401, "QM-CKPT-04"),
        (416, "QM-CKPT-044"),
        (418, "QM-CKPT-040"),
    ],
)
def test_a_status_that_will_not_pass(hub: Any, failed: Failed, status: int, code: str) -> None:
    hub.push(REPO, MODEL)
    hub.failures = [status] * 9
    assert failed(headers, "config.json").startswith(code)
    assert len(hub.of("config.json")) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_status_that_may_pass(hub: Any, failed: Failed, status: int) -> None:
    hub.push(REPO, MODEL)
    hub.failures = [status, status]
    assert set(headers().tensors) == set(WEIGHTS)
    hub.failures = [status] * 99
    assert failed(headers, str(status)) == "QM-CKPT-040"
    assert len(hub.failures) == 96


def test_nobody_answers(hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", nowhere)
        found = failed(headers, REPO, "HF_ENDPOINT")
    assert found == "QM-CKPT-040"


def test_an_answer_that_takes_too_long(
    hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(REPO, MODEL)
    source = open_source(REPO)
    assert source.exists("config.json")
    hub.delay = 0.3
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    monkeypatch.setattr("quantmill.checkpoint.hubcalls.PAUSES", ())
    assert failed(lambda: read_headers(source), "in time") == "QM-CKPT-040"
    assert failed(headers, "in time") == "QM-CKPT-040"


@pytest.mark.parametrize("listing", [b"<html>log in</html>", b"{", b"[]", b"{}"])
def test_a_listing_that_is_none(hub: Any, failed: Failed, listing: bytes) -> None:
    hub.push(REPO, MODEL)
    hub.listing = listing
    assert failed(headers, REPO) == "QM-CKPT-040"


Spoiled = tuple[dict[str, str], bytes]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda headers, body: ({**headers, "Content-Range": "bytes 1-9/20"}, body),
        lambda headers, body: ({**headers, "Content-Range": "bytes 1-21/22"}, body),
        lambda headers, body: ({**headers, "Content-Range": "bytes 0-21/23"}, body),
        lambda headers, body: ({**headers, "Content-Range": "pages 1-9"}, body),
        lambda headers, body: ({**headers, "Content-Range": "bytes 0-3/*"}, body[:4]),
        lambda headers, body: ({**headers, "Content-Range": "bytes 0-3/4"}, body[:4]),
        lambda headers, body: ({"X": "no range"}, body),
        lambda headers, body: ({**headers, "Content-Encoding": "br"}, body),
        lambda headers, body: (headers, body[:-1]),
    ],
    ids=[
        "other place",
        "shifted",
        "longer",
        "no bytes",
        "short",
        "other size",
        "none",
        "encoded",
        "lacks a byte",
    ],
)
def test_an_answer_that_is_not_the_range(
    hub: Any, failed: Failed, spoil: Callable[..., Spoiled]
) -> None:
    hub.push(REPO, MODEL)
    hub.spoil = spoil
    assert failed(headers, "config.json") == "QM-CKPT-044"


def test_a_connection_that_breaks_in_the_middle(hub: Any, failed: Failed) -> None:
    hub.push(REPO, MODEL)
    left = [2]

    def spoil(headers: dict[str, str], body: bytes) -> Spoiled:
        if left[0] > 0:
            left[0] -= 1
            return {**headers, "Content-Length": str(len(body))}, body[: len(body) // 2]
        return headers, body

    hub.spoil = spoil
    assert set(headers().tensors) == set(WEIGHTS)
    left[0] = 99
    assert failed(headers, "config.json") == "QM-CKPT-040"


def test_a_malformed_file_is_the_files_fault(hub: Any, failed: Failed) -> None:
    hub.push(REPO, {"model.safetensors": b"\xff" * 100_000})
    assert failed(headers, "model.safetensors") == "QM-CKPT-021"


def test_a_full_disk(hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(REPO, MODEL)

    def full(*arguments: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    source = open_source(REPO)
    assert failed(lambda: source.local_path("config.json"), "HF_HOME") == "QM-CKPT-052"


def test_signatures_of_redirects_are_not_shown(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(REPO, MODEL)
    hub.redirect = True
    source = open_source(REPO)
    assert source.exists("config.json")
    monkeypatch.setattr(
        hub, "_file", lambda request, served, *rest: hub._send(request, served, 418, {}, b"")
    )
    with pytest.raises(HubError) as caught:
        read_headers(source)
    assert "418" in str(caught.value) and "sig=1" not in str(caught.value)


def test_a_client_of_requests(hub: Any, failed: Failed, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub before 1.0 hands out sessions of requests, whose streams differ."""
    requests = pytest.importorskip("requests")
    hub.push(REPO, MODEL)
    source = open_source(REPO)
    assert source.exists("config.json")
    session = requests.Session()
    session.trust_env = False
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(
        huggingface_hub.utils, "hf_raise_for_status", lambda answer: answer.raise_for_status()
    )
    hub.ignore_ranges = True
    assert set(read_headers(source).tensors) == set(WEIGHTS)
    hub.failures = [503] * 3
    assert failed(lambda: source.read("config.json", 0, 9), "503") == "QM-CKPT-040"
    hub.failures = [404]
    assert failed(lambda: source.read("config.json", 0, 9)) == "QM-CKPT-041"
