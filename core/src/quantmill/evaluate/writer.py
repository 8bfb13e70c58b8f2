"""Writing a reference file: one pass of the float model, window after window.

The format is described in :mod:`quantmill.evaluate.reference`.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from quantmill.evaluate.reference import (
    HEADER_BYTES,
    MAGIC,
    PREFIX,
    ReferenceLogits,
    ReferenceSpec,
)
from quantmill.evaluate.storage import Encoding, buffer_of, choose_encoding, encode
from quantmill.findings import QuantmillError, declare

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ReferenceWriter"]

INCOMPLETE = declare("QM-EVAL-012", "Reference rows are missing or too many")
UNWRITABLE = declare("QM-EVAL-013", "The reference cannot be written")


class ReferenceWriter:
    """Writes one reference; a context manager that keeps the file only if all went well.

    ``result`` is the finished :class:`ReferenceLogits` once the ``with`` block is left or
    :meth:`commit` returns, None before.
    """

    def __init__(self, path: str | os.PathLike[str], spec: ReferenceSpec) -> None:
        self.path = Path(path)
        self.spec = spec
        self.result: ReferenceLogits | None = None
        self._rows = spec.rows()
        self._left = self._rows[0]
        self._checksums: list[int] = []
        self._checksum = 0
        self._vocab: int | None = None
        self._encoding: Encoding = "float32"
        self._stream: IO[bytes] | None = None
        self._temporary: Path | None = None
        self._aborted = False

    def add(self, log_probs: Tensor) -> None:
        """Append float32 [r, V] normalised log-probabilities; rows of one window, in order.

        Raises:
            QuantmillError: ``QM-EVAL-012`` (more rows than the window has, other vocabulary),
                ``QM-EVAL-013`` (the file system refuses).
        """
        self._refuse_if_aborted()
        rows, vocab = log_probs.shape
        if self._vocab is None:
            self._vocab = vocab
            self._encoding = choose_encoding(self.spec.storage, sum(self._rows), vocab)
        window = len(self._checksums)
        if vocab != self._vocab or rows > self._left:
            cause = f"{rows} row(s) of {vocab}; open: {self._left} row(s) of {self._vocab}"
            fix = "pass the scored rows of every window once, in order"
            raise QuantmillError(INCOMPLETE(f"window {window}", cause, fix))
        stored = encode(log_probs, self._encoding)
        view = buffer_of(stored)
        with self._guard():
            self._open().write(view)
        self._checksum = zlib.crc32(view, self._checksum)
        self._left -= rows
        if self._left == 0:
            self._checksums.append(self._checksum)
            self._checksum = 0
            if len(self._checksums) < len(self._rows):
                self._left = self._rows[len(self._checksums)]

    def commit(self) -> ReferenceLogits:
        """Complete the file and rename it into place.

        Raises:
            QuantmillError: ``QM-EVAL-012`` (windows are missing), ``QM-EVAL-013``.
        """
        if self.result is not None:
            return self.result
        self._refuse_if_aborted()
        done = len(self._checksums)
        if done < len(self._rows) or self._vocab is None:
            self.abort()
            cause = f"{done} of {len(self._rows)} windows were written"
            fix = "evaluate all windows before committing"
            raise QuantmillError(INCOMPLETE(str(self.path), cause, fix))
        header = {
            "spec": asdict(self.spec),
            "vocab": self._vocab,
            "encoding": self._encoding,
            "byteorder": sys.byteorder,
        }
        with self._guard():
            text = json.dumps(header).encode()
            if len(text) > HEADER_BYTES - PREFIX.size:
                raise OSError("the model's identity is too long for the header")
            stream = self._open()
            stream.write(struct.pack(f"<{done}I", *self._checksums))
            stream.seek(0)
            stream.write(PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text)
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            self._stream = None
            if self._temporary is not None:
                Path(self._temporary).replace(self.path)
            self._temporary = None
            _sync_directory(self.path.parent)
        self.result = ReferenceLogits(self.path, self.spec, self._vocab, self._encoding)
        return self.result

    def abort(self) -> None:
        """Drop what was written so far; harmless after :meth:`commit`."""
        self._aborted = self.result is None
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _refuse_if_aborted(self) -> None:
        if self._aborted:
            fix = "make a new writer"
            raise QuantmillError(INCOMPLETE(str(self.path), "the writer was aborted", fix))

    def _open(self) -> IO[bytes]:
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self.path.parent, prefix=".writing-")
            self._temporary = Path(name)
            self._stream = os.fdopen(number, "w+b")
            self._stream.write(bytes(HEADER_BYTES))
        return self._stream

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            fix = "free space, or point QUANTMILL_CACHE to a folder that can be written"
            finding = UNWRITABLE(str(self.path), str(error), fix)
            raise QuantmillError(finding) from error


def _sync_directory(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
