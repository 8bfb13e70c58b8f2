"""The manifest beside a written checkpoint: what wrote it, and a SHA-256 for every file.

It holds no time and no path, so that the same command gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantmill.checkpoint import codes
from quantmill.findings import Findings

__all__ = ["MANIFEST_NAME", "make_manifest", "verify"]

MANIFEST_NAME = "quantmill_manifest.json"
_SCHEMA = 1
_TOOLS = ("quantmill", "torch", "safetensors")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_manifest(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of all files in ``folder``; ``about`` says how they were made."""
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
    """Compare a folder with its manifest; an empty collection means that they agree."""
    found = Findings()
    path = folder / MANIFEST_NAME
    if not path.is_file():
        found.add(codes.MANIFEST_MISSING(str(folder), "it has no manifest", "write it anew"))
        return found
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.add(codes.MANIFEST_INVALID(MANIFEST_NAME, str(error), "write it anew"))
        return found
    for name, (size, digest) in expected.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            found.add(codes.FILE_MISSING(name, "the manifest lists it", "get it again"))
        elif file.stat().st_size != size or _digest(file) != digest:
            found.add(codes.FILE_CHANGED(name, "size or SHA-256 differ", "get it again"))
    for file in sorted(folder.iterdir()):
        if file.name not in expected and file.name != MANIFEST_NAME:
            found.add(codes.FILE_EXTRA(file.name, "the manifest lacks it", "nothing to do"))
    return found
