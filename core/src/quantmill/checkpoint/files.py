"""Plain file names and small JSON files, neither of which is believed before it is checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.checkpoint import codes
from quantmill.findings import Finding, FindingCode, QuantmillError

if TYPE_CHECKING:
    from quantmill.checkpoint.source import Source

__all__ = ["MAX_JSON_BYTES", "FolderSource", "is_plain_name", "read_json"]

MAX_JSON_BYTES: Final = 100_000_000
"""The longest JSON file that is read; the index of a model of a million tensors is shorter."""


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is a file's name that stays in its folder and can be shown to a user."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    # isprintable() is False for NUL, line breaks and lone surrogates, so this can be encoded.
    return "/" not in name and "\\" not in name and len(name.encode()) <= 255


def read_json(
    source: Source, name: str, problems: list[Finding], code: FindingCode = codes.JSON_INVALID
) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    A malformed file gives None too, and a finding ``code`` in ``problems``.

    Raises:
        QuantmillError: the file cannot be read at all.
    """
    if not source.exists(name):
        return None
    size = source.size(name)
    cause = ""
    if size > MAX_JSON_BYTES:
        cause = f"it has {size:,} bytes; more than {MAX_JSON_BYTES:,} are not read"
    else:
        try:
            data = json.loads(source.read(name, 0, size))
            if isinstance(data, dict):
                return data
            cause = "it holds no JSON object"
        except RecursionError:
            cause = "it is nested absurdly deep"
        except ValueError as error:  # Malformed JSON, malformed UTF-8, an integer of 5000 digits.
            cause = f"it is not valid JSON: {str(error)[:160]}"
    problems.append(code(name, cause, "correct the file, or get it again from its source"))
    return None


class FolderSource:
    """A local folder; with ``only``, one file of it."""

    def __init__(self, path: Path, only: str | None = None) -> None:
        self.path = path
        self.only = only

    def names(self) -> list[str]:
        """Names of the files.

        Raises:
            QuantmillError: ``QM-CKPT-031``, the folder cannot be listed.
        """
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except OSError as error:
            raise self._failed(str(self.path), error) from error

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return os.path.isfile(self.path / name)  # noqa: PTH113 - False for any name, never raises

    def size(self, name: str) -> int:
        """Bytes of a file."""
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise self._failed(name, error) from error

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``; fewer where the file ends before."""
        try:
            with (self.path / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(stop - start)
        except OSError as error:
            raise self._failed(name, error) from error

    def local_path(self, name: str) -> Path:
        """The file itself."""
        return self.path / name

    def describe(self) -> str:
        """The path as the user gave it."""
        return str(self.path / self.only if self.only else self.path)

    def identity(self) -> str:
        """Changes when a weight file does."""
        parts = [
            f"{name}:{self.size(name)}:{(self.path / name).stat().st_mtime_ns}"
            for name in self.names()
            if name.endswith(".safetensors")
        ]
        return f"{self.path.resolve()}|" + "|".join(parts)

    @staticmethod
    def _failed(where: str, error: OSError) -> QuantmillError:
        cause = f"it cannot be read: {error.strerror or error}"
        return QuantmillError(
            codes.READ_FAILED(where, cause, "check the rights of the file and the disk")
        )
