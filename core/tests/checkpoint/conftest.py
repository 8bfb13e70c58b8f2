"""A Hub on this machine, and the parts of safetensors files that tests put together by hand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from quantmill.findings import QuantmillError


@dataclass
class Served:
    """One request and what was sent for it."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str
    status: int = 0
    sent: int = 0


class FakeHub:
    """Serves repositories as a Hub does, records every request, and misbehaves on demand."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.log: list[Served] = []
        self.token: str | None = None  # needed, when set
        self.gated = False
        self.failures: list[int] = []  # statuses to answer files with, before all is well
        self.ignore_ranges = False
        self.redirect = False
        self.delay = 0.0
        self.list_sizes = True
        self.listing: bytes | None = None
        # Gets the headers and the body of an answer with a range and gives what to send instead.
        self.spoil: Callable[[dict[str, str], bytes], tuple[dict[str, str], bytes]] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def push(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit at the tip of a branch; its id."""
        commits = self.commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def push_folder(self, repo: str, folder: Path, branch: str = "main") -> str:
        return self.push(repo, {path.name: path.read_bytes() for path in folder.iterdir()}, branch)

    def of(self, ending: str, method: str = "GET") -> list[Served]:
        """The requests so far for files whose name ends so."""
        return [item for item in self.log if item.method == method and item.path.endswith(ending)]

    # -- answers -------------------------------------------------------------------------------

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).lstrip("/")
        headers = request.headers
        served = Served(
            request.command,
            path,
            headers.get("Range"),
            headers.get("Authorization"),
            headers.get("Host", ""),
        )
        self.log.append(served)
        time.sleep(self.delay)
        if path.startswith("api/models/"):
            repo, _, revision = path.removeprefix("api/models/").partition("/revision/")
            self._list(request, served, repo, revision)
        elif path.startswith("cdn/"):
            _, org, name, commit, file = path.split("/", 4)
            self._file(request, served, self.commits[f"{org}/{name}"][commit][file], {})
        elif "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            self._resolve(request, served, repo, *rest.split("/", 1))
        else:
            self._send(request, served, 404, {}, b"")

    def _refused(self, request: Any, served: Served) -> bool:
        if self.token is not None and served.authorization != f"Bearer {self.token}":
            self._send(request, served, 401, {"X-Error-Code": "RepoNotFound"}, b"")
            return True
        return False

    def _list(self, request: Any, served: Served, repo: str, revision: str) -> None:
        if self._refused(request, served):
            return
        if repo not in self.commits:
            self._send(request, served, 404, {"X-Error-Code": "RepoNotFound"}, b"")
            return
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            self._send(request, served, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
            return
        files = self.commits[repo][commit]
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
        if self.list_sizes:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        body = json.dumps({"id": repo, "sha": commit, "siblings": siblings, "tags": []}).encode()
        if self.listing is not None:
            body = self.listing
        self._send(request, served, 200, {"Content-Type": "application/json"}, body)

    def _resolve(self, request: Any, served: Served, repo: str, revision: str, name: str) -> None:
        if self._refused(request, served):
            return
        if self.gated:
            self._send(request, served, 403, {"X-Error-Code": "GatedRepo"}, b"")
            return
        if self.failures:
            self._send(request, served, self.failures.pop(0), {}, b"")
            return
        commit = self.branches[repo].get(revision, revision)
        data = self.commits[repo].get(commit, {}).get(name)
        if data is None:
            self._send(request, served, 404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit}
        if self.redirect:
            # By another name of this machine, as a Hub sends a client to another host.
            headers["Location"] = f"http://localhost:{self.port}/cdn/{repo}/{commit}/{name}?sig=1"
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(data))}
            self._send(request, served, 302, headers, b"")
            return
        self._file(request, served, data, headers)

    def _file(self, request: Any, served: Served, data: bytes, headers: dict[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        if served.range is None or self.ignore_ranges:
            self._send(request, served, 200, headers, data)
            return
        first, _, last = served.range.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            self._send(request, served, 416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        body = data[start:stop]
        if self.spoil is not None:
            headers, body = self.spoil(headers, body)
        self._send(request, served, 206, headers, body)

    @staticmethod
    def _send(
        request: Any, served: Served, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        served.status = status
        try:
            request.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                request.send_header(key, value)
            request.end_headers()
            if request.command == "HEAD":
                return
            for place in range(0, len(body), 1 << 14):
                piece = body[place : place + (1 << 14)]
                request.wfile.write(piece)
                served.sent += len(piece)
            if int(headers.get("Content-Length", len(body))) > len(body):
                request.close_connection = True
        except OSError:  # The client has seen enough.
            request.close_connection = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that huggingface_hub talks to, with an empty cache.

    ``HF_ENDPOINT`` is read when huggingface_hub is imported, so its constants are set as well.
    """
    from huggingface_hub import constants

    served = FakeHub()
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("quantmill.checkpoint.hubcalls.PAUSES", (0.01, 0.01))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    yield served
    served.close()


@pytest.fixture(scope="session")
def pack() -> Callable[..., bytes]:
    """``pack(header, data)``: a safetensors file; the header as a table or as its very bytes."""

    def pack(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        stated = len(raw) if length is None else length
        return stated.to_bytes(8, "little") + raw + data

    return pack


@pytest.fixture(scope="session")
def failed() -> Callable[..., str]:
    """``failed(call, *parts)``: the code of the one finding it raises, with ``parts`` in it."""

    def failed(call: Callable[[], object], *parts: str) -> str:
        with pytest.raises(QuantmillError) as caught:
            call()
        (finding,) = caught.value.findings
        assert finding.cause and finding.fix and "\n" not in finding.cause
        for part in parts:
            assert part in str(finding)
        return finding.code

    return failed
