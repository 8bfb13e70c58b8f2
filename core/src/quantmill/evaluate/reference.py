"""Log-probabilities of the reference model, cached on disk.

KL divergence needs the distributions of two models. The float model is run once, its
distributions go to a file, the model is dropped, and every quantized model is compared with the
file: the two never coexist in memory.

A file is plain binary, little-endian as declared in its header, without pickle::

    8 bytes   magic "QMREFL01"
    4 bytes   length of the JSON header
    4 bytes   CRC-32 of the JSON header
    ...       JSON header, zero-padded to 4096 bytes from the start of the file
    ...       rows x vocabulary values, window after window (see quantmill.evaluate.storage)
    4 bytes   CRC-32 of the values, per window

It is written beside its final name and renamed into place when complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.evaluate.protocols import (
    DEFAULT_CONTEXT,
    PROTOCOLS,
    UNKNOWN_PROTOCOL,
    Protocol,
    get_protocol,
)
from quantmill.evaluate.storage import (
    ENCODINGS,
    Encoding,
    Storage,
    as_encoding,
    buffer_of,
    decode,
)
from quantmill.findings import QuantmillError, declare

__all__ = ["ReferenceLogits", "ReferenceSpec"]

MAGIC: Final = b"QMREFL01"
HEADER_BYTES: Final = 4096
PREFIX = struct.Struct("<8sII")

UNREADABLE = declare("QM-EVAL-014", "The reference cannot be read")


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """What a reference was computed from; equal specs have equal references.

    Attributes:
        model: the caller's identity of the float model, for example the checkpoint's SHA-256 or
            ``"<hub id>@<revision>"`` with the dtype it computes in.
        tokens_sha256: SHA-256 of the token ids as little-endian int64.
        n_tokens: length of the token sequence.
        protocol: name of the protocol.
        context: window length in tokens.
        max_windows: bound on the number of windows, or None.
        bos_id: BOS put at the start of windows, None if the protocol or tokenizer has none.
        storage: requested storage.
    """

    model: str
    tokens_sha256: str
    n_tokens: int
    protocol: str
    context: int
    max_windows: int | None = None
    bos_id: int | None = None
    storage: Storage = "auto"

    @classmethod
    def of(
        cls,
        model: str,
        tokens: Tensor,
        *,
        protocol: str | Protocol = "blocks",
        context: int = DEFAULT_CONTEXT,
        max_windows: int | None = None,
        bos_id: int | None = None,
        storage: Storage = "auto",
    ) -> ReferenceSpec:
        """The specification for int64 [n] ``tokens``.

        Raises:
            QuantmillError: ``QM-EVAL-001`` (also for a protocol that is not one of
                :data:`PROTOCOLS`, since a file knows only its name), ``002``, ``003``.
        """
        rule = get_protocol(protocol)
        if PROTOCOLS.get(rule.name) != rule:
            cause = "a reference file knows protocols by name, and this is none of the named ones"
            fix = "use one of " + ", ".join(repr(name) for name in PROTOCOLS)
            raise QuantmillError(UNKNOWN_PROTOCOL(f"protocol {rule.name!r}", cause, fix))
        rule.check(tokens.numel(), context, max_windows)
        ids = tokens.detach().to("cpu", torch.int64).contiguous()
        digest = hashlib.sha256(buffer_of(ids)).hexdigest()
        bos = bos_id if rule.bos else None
        n_tokens = ids.numel()
        return cls(model, digest, n_tokens, rule.name, context, max_windows, bos, storage)

    @property
    def key(self) -> str:
        """SHA-256 (hex) over every field and the version of the file format."""
        text = json.dumps([MAGIC.decode(), asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def rows(self) -> list[int]:
        """Number of scored predictions of each window."""
        rule = get_protocol(self.protocol)
        windows = rule.windows(self.n_tokens, self.context, self.bos_id, self.max_windows)
        return [window.scored for window in windows]

    def difference(self, other: ReferenceSpec) -> list[str]:
        """Fields (model and storage aside) that differ, as ``"name: mine != other's"``."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name}: {mine[name]!r} != {theirs[name]!r}"
            for name in mine
            if name not in ("model", "storage") and mine[name] != theirs[name]
        ]


class ReferenceLogits:
    """A complete reference file, read window by window through a memory map.

    Attributes:
        path: the file.
        spec: what it was computed from.
        vocab: vocabulary size V.
        encoding: how values are stored.
    """

    def __init__(self, path: Path, spec: ReferenceSpec, vocab: int, encoding: Encoding) -> None:
        self.path = path
        self.spec = spec
        self.vocab = vocab
        self.encoding: Encoding = encoding
        self._offsets = [0]
        for rows in spec.rows():
            self._offsets.append(self._offsets[-1] + rows)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> ReferenceLogits:
        """Open a file after checking header, shape, size and, if ``verify``, every checksum.

        Raises:
            QuantmillError: ``QM-EVAL-014`` when anything is wrong; the cause says what.
        """
        file = Path(path)
        try:
            result = cls._parse(file)
            if verify:
                result._verify()
        except (OSError, ValueError, KeyError, TypeError, QuantmillError) as error:
            cause = str(error) or type(error).__name__
            fix = "delete the file and evaluate the reference model again"
            raise QuantmillError(UNREADABLE(str(file), cause, fix)) from error
        return result

    @classmethod
    def _parse(cls, path: Path) -> ReferenceLogits:
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
            size = os.fstat(stream.fileno()).st_size
        if len(head) < HEADER_BYTES:
            raise ValueError(f"the file ends after {len(head)} bytes, inside its header")
        magic, length, checksum = PREFIX.unpack_from(head)
        if magic != MAGIC:
            raise ValueError("the file is no reference of this format")
        text = head[PREFIX.size : PREFIX.size + length]
        if length > HEADER_BYTES - PREFIX.size or zlib.crc32(text) != checksum:
            raise ValueError("the header's checksum is wrong")
        header: dict[str, Any] = json.loads(text)
        if header["byteorder"] != sys.byteorder:
            raise ValueError(f"the values are {header['byteorder']}-endian")
        encoding = as_encoding(header["encoding"])
        vocab = header["vocab"]
        if encoding is None or not isinstance(vocab, int) or vocab < 1:
            raise ValueError(f"encoding {header['encoding']!r}, vocabulary {vocab!r}")
        result = cls(path, ReferenceSpec(**header["spec"]), vocab, encoding)
        if size != result.nbytes:
            raise ValueError(f"the file has {size} bytes, its header says {result.nbytes}")
        return result

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self._offsets) - 1

    @property
    def rows(self) -> int:
        """Total number of scored predictions."""
        return self._offsets[-1]

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return HEADER_BYTES + self.rows * self._row_bytes + 4 * self.windows

    @property
    def _row_bytes(self) -> int:
        return self.vocab * ENCODINGS[self.encoding].itemsize

    def log_probs(self, window: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Log-probabilities, float32 [stop - start, V] on the CPU, of rows of one window.

        Rows count the scored predictions of the window. The part of the file is mapped only
        during the call.

        Raises:
            IndexError: no such window or rows.
            QuantmillError: ``QM-EVAL-014``, the file has vanished or shrunk.
        """
        if not 0 <= window < self.windows:
            raise IndexError(f"window {window} of {self.windows}")
        begin, end = self._offsets[window], self._offsets[window + 1]
        stop = end - begin if stop is None else stop
        if not 0 <= start <= stop <= end - begin:
            raise IndexError(f"rows {start} to {stop} of window {window} with {end - begin}")
        if start == stop:
            return torch.empty(0, self.vocab)
        with self._map(begin + start, begin + stop) as (view, shift):
            dtype = ENCODINGS[self.encoding]
            count = (stop - start) * self.vocab
            stored = torch.frombuffer(view, dtype=dtype, count=count, offset=shift)
            result = decode(stored.view(stop - start, self.vocab), self.encoding)
            del stored  # or the map could not be closed
        return result

    @contextlib.contextmanager
    def _map(self, start: int, stop: int) -> Iterator[tuple[mmap.mmap, int]]:
        """Map absolute rows privately; gives the map and the offset of the first row in it."""
        first = HEADER_BYTES + start * self._row_bytes
        shift = first % mmap.ALLOCATIONGRANULARITY
        length = shift + (stop - start) * self._row_bytes
        try:
            with self.path.open("rb") as stream:
                offset = first - shift
                view = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=offset)
        except (OSError, ValueError) as error:
            fix = "evaluate the reference model again"
            raise QuantmillError(UNREADABLE(str(self.path), str(error), fix)) from error
        try:
            yield view, shift
        finally:
            view.close()

    def _verify(self) -> None:
        with self.path.open("rb") as stream:
            stream.seek(-4 * self.windows, os.SEEK_END)
            expected = struct.unpack(f"<{self.windows}I", stream.read())
            stream.seek(HEADER_BYTES)
            for window in range(self.windows):
                rows = self._offsets[window + 1] - self._offsets[window]
                left, checksum = rows * self._row_bytes, 0
                while left:
                    block = stream.read(min(left, 1 << 22))
                    if not block:
                        raise ValueError("the file is truncated")
                    checksum = zlib.crc32(block, checksum)
                    left -= len(block)
                if checksum != expected[window]:
                    raise ValueError(f"the checksum of window {window} is wrong")
