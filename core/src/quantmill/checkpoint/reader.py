"""Streaming reader: tensors straight into their memory, or by row blocks through two buffers.

Reads use ``pread``, so pages of the file do not count as this process's memory; ``mapped`` is the
exception, for tensors that stay on the CPU exactly as they lie on the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import torch_dtype, torch_shape
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader

__all__ = ["TensorReader", "torch_dtype"]


class TensorReader:
    """Reads tensors of a checkpoint; safe to use from several threads."""

    def __init__(self, headers: CheckpointHeaders, *, buffer_bytes: int = 4 << 20) -> None:
        self.headers = headers
        self._buffer_bytes = buffer_bytes
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="quantmill-read")
        # Kept for all tensors: new ones for each would fault in their pages again and leave
        # holes in the heap between what stays.
        self._buffers: list[Tensor] = []

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Mapped tensors stay valid."""
        self._ahead.shutdown(wait=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _path(self, file: str) -> Path:
        path: Path = self.headers.source.local_path(file)
        return path

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self._path(file), os.O_RDONLY)
            return self._files[file]

    def _fill(self, header: TensorHeader, out: Tensor, start: int, count: int) -> None:
        """Read ``count`` bytes from ``start`` of the tensor's data into ``out``'s memory."""
        if count == 0:
            return
        view = memoryview((ctypes.c_char * count).from_address(out.data_ptr())).cast("B")
        descriptor = self._open(header.file)
        done = 0
        while done < count:
            got = os.preadv(descriptor, [view[done:]], header.start + start + done)
            if got == 0:
                raise QuantmillError(
                    codes.TRUNCATED(
                        f"{header.file}: {header.name}",
                        f"the file ended {count - done} bytes early while it was read",
                        "the file is truncated: download or copy it again",
                    )
                )
            done += got

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Fill a contiguous CPU tensor from element ``start_elem`` on; no temporary is made."""
        if not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError("read_into needs a contiguous CPU tensor")
        size = out.element_size()
        count = out.numel() * size
        if start_elem * size + count > header.nbytes:
            raise ValueError(f"{header.name}: the tensor does not have that many elements")
        self._fill(header, out, start_elem * size, count)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in memory of its own."""
        header = self.headers.tensors[name]
        shape = torch_shape(header.dtype, tuple(header.shape))
        out = torch.empty(shape, dtype=torch_dtype(header.dtype, name))
        self.read_into(header, out)
        return out

    def mapped(self, name: str) -> Tensor:
        """The tensor as private pages of the file: no copy, writes do not reach the file."""
        header = self.headers.tensors[name]
        dtype = torch_dtype(header.dtype, name)
        if header.nbytes == 0 or header.start % dtype.itemsize:
            return self.tensor(name)
        with self._lock:
            file = self._maps.get(header.file)
        if file is None:
            descriptor = self._open(header.file)
            with self._lock:
                file = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                self._maps[header.file] = file
        if header.stop > len(file):
            raise QuantmillError(
                codes.TRUNCATED(header.file, f"{header.name} ends after the file", "get it again")
            )
        flat = torch.frombuffer(
            file, dtype=dtype, count=header.nbytes // dtype.itemsize, offset=header.start
        )
        return flat.reshape(torch_shape(header.dtype, tuple(header.shape)))

    def _staging(self, count: int) -> list[Tensor]:
        """Two reusable buffers of ``count`` bytes, aligned for any dtype."""
        if not self._buffers or self._buffers[0].numel() < count:
            size = max(count, self._buffer_bytes)
            self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        return [buffer[:count] for buffer in self._buffers]

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, block)`` of at most ``rows`` rows; a block is valid until the next one.

        Two buffers are in use: one with the caller, one being filled.
        """
        header = self.headers.tensors[name]
        dtype = torch_dtype(header.dtype, name)
        total, rest = header.shape[0], tuple(header.shape[1:])
        width = header.nbytes // max(1, total)
        rows = max(1, min(rows, total))
        buffers = [
            buffer.view(dtype).reshape(rows, *rest) for buffer in self._staging(rows * width)
        ]

        def fetch(index: int, start: int) -> Tensor:
            block = buffers[index][: min(rows, total - start)]
            self._fill(header, block, start * width, block.shape[0] * width)
            return block

        pending: Future[Tensor] | None = self._ahead.submit(fetch, 0, 0) if total else None
        turn, start = 0, 0
        while pending is not None:
            block = pending.result()
            following = start + block.shape[0]
            turn = 1 - turn
            pending = self._ahead.submit(fetch, turn, following) if following < total else None
            yield start, block
            start = following
