"""The manifest beside a written checkpoint: what wrote it, and a SHA-256 for every file.

It holds no time and no path, so that the same command gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from quantmill.checkpoint import codes
from quantmill.checkpoint.files import FolderSource, is_plain_name, read_json
from quantmill.findings import Finding, Findings

__all__ = ["MANIFEST_NAME", "make_manifest", "verify"]

MANIFEST_NAME = "quantmill_manifest.json"
_SCHEMA = 1
_TOOLS = ("quantmill", "torch", "safetensors")
_AGAIN: Final = (
    "get it again from where the checkpoint comes from; if it was changed on purpose, remove"
    f" {MANIFEST_NAME}"
)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_manifest(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of all files in ``folder``; ``about`` says how they were made.

    Raises:
        OSError: a file cannot be read.
    """
    versions = {}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    return {"schema": _SCHEMA, "versions": versions, **about, "files": files}


def verify(folder: Path) -> Findings:
    """Compare a folder with its manifest; an empty collection means that they agree.

    Raises:
        QuantmillError: ``QM-CKPT-031``, the folder or its manifest cannot be read.
    """
    found = Findings()
    source = FolderSource(folder)
    if not source.exists(MANIFEST_NAME):
        found.add(codes.MANIFEST_MISSING(str(folder), "it has no manifest", "write it anew"))
        return found
    problems: list[Finding] = []
    data = read_json(source, MANIFEST_NAME, problems, codes.MANIFEST_INVALID)
    found.extend(problems)
    if data is None:
        return found
    expected = _expected(data)
    if expected is None:
        cause = "its files are not a table of names to bytes and sha256"
        found.add(codes.MANIFEST_INVALID(MANIFEST_NAME, cause, "write the checkpoint anew"))
        return found
    for name, (size, digest) in expected.items():
        if not source.exists(name):
            cause = "the manifest lists it, and the folder has no such file"
            found.add(codes.FILE_MISSING(name, cause, _AGAIN))
            continue
        cause = ""
        try:
            there = source.size(name)
            if there != size:
                cause = f"it has {there:,} bytes, and {size:,} by the manifest"
            elif _digest(folder / name) != digest:
                cause = "its SHA-256 is not the manifest's: bytes of it were changed"
        except OSError as error:
            cause = f"it cannot be read: {error.strerror or error}"
            found.add(codes.READ_FAILED(name, cause, "check the rights of the file and the disk"))
            continue
        if cause:
            found.add(codes.FILE_CHANGED(name, cause, _AGAIN))
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in expected and name != MANIFEST_NAME:
            found.add(codes.FILE_EXTRA(name, "the manifest lacks it", "nothing to do"))
    return found


def _expected(data: Mapping[str, Any]) -> dict[str, tuple[int, str]] | None:
    """Bytes and digest by file name, or None where the manifest is malformed."""
    files = data.get("files")
    if not isinstance(files, dict):
        return None
    expected: dict[str, tuple[int, str]] = {}
    for name, entry in files.items():
        if not is_plain_name(name) or not isinstance(entry, dict):
            return None
        size, digest = entry.get("bytes"), entry.get("sha256")
        if not isinstance(size, int) or not isinstance(digest, str):
            return None
        expected[name] = (size, digest)
    return expected
