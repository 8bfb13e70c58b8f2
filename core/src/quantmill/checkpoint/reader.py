"""Streaming reader: tensors straight into their memory, or by row blocks through two buffers.

Reads use ``pread``, so pages of the file do not count as this process's memory; ``mapped`` is the
exception, for tensors that stay on the CPU exactly as they lie on the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import torch_dtype, torch_shape
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader

__all__ = ["TensorReader", "torch_dtype"]

_PART = 4 << 20
"""Least bytes that are worth a thread of their own."""


class TensorReader:
    """Reads tensors of a checkpoint; safe to use from several threads.

    Methods that take a tensor's name raise QuantmillError: ``QM-CKPT-030``, the file became
    shorter; ``031``, it cannot be read; ``032``, there is no such tensor; ``033``, PyTorch has no
    such dtype; ``040`` to ``044``, the Hub does not give the file.
    """

    def __init__(
        self,
        headers: CheckpointHeaders,
        *,
        buffer_bytes: int = 4 << 20,
        pinned: bool = False,
        threads: int = 1,
    ) -> None:
        """Args:
        headers: of the checkpoint to read.
        buffer_bytes: least size of each of the two buffers of :meth:`row_blocks`.
        pinned: whether those lie in page-locked memory, which a GPU copies from by itself.
        threads: so many share the reading of a large block.
        """
        self.headers = headers
        self._buffer_bytes = buffer_bytes
        self._pinned = pinned
        self._hands = ThreadPoolExecutor(threads, "quantmill-part") if threads > 1 else None
        self._threads = threads
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._views: weakref.WeakValueDictionary[tuple[str, int, int], memoryview] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self._closed = False
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="quantmill-read")
        # Kept for all tensors: new ones for each would fault in their pages again and leave
        # holes in the heap between what stays. A pair is lent to one iteration at a time.
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._begun: _Blocks | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Mapped tensors stay valid."""
        self._ahead.shutdown(wait=True)
        if self._hands is not None:
            self._hands.shutdown(wait=True)
        with self._lock:
            self._closed = True
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
            self._maps.clear()
            self._pairs.clear()
            self._begun = None

    def _header(self, name: str) -> TensorHeader:
        try:
            return self.headers.tensors[name]
        except KeyError:
            from quantmill.config import suggestion

            near = suggestion(name, self.headers.tensors)
            fix = near or "quantmill inspect lists its tensors"
            cause = f"{self.headers.source.describe()} has no such tensor"
            raise QuantmillError(codes.UNKNOWN_TENSOR(name, cause, fix)) from None

    def _open(self, file: str) -> int:
        with self._lock:
            if file in self._files:
                return self._files[file]
        # Outside the lock: this may be a download, during which other files can be read.
        path = self.headers.source.local_path(file)
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            if file not in self._files:
                try:
                    self._files[file] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise _failed(file, error) from error
            return self._files[file]

    def _fill(self, header: TensorHeader, out: Tensor, start: int, count: int) -> None:
        """Read ``count`` bytes from ``start`` of the tensor's data into ``out``'s memory."""
        if count == 0:
            return
        if self._hands is None or count < 2 * _PART:
            self._fill_part(header, out.data_ptr(), start, count)
            return
        size = max(_PART, -(-count // self._threads))
        parts = [
            self._hands.submit(
                self._fill_part, header, out.data_ptr() + at, start + at, min(size, count - at)
            )
            for at in range(0, count, size)
        ]
        wait(parts)
        for part in parts:
            part.result()

    def _fill_part(self, header: TensorHeader, address: int, start: int, count: int) -> None:
        view = memoryview((ctypes.c_char * count).from_address(address)).cast("B")
        descriptor = self._open(header.file)
        done = 0
        while done < count:
            try:
                got = os.preadv(descriptor, [view[done:]], header.start + start + done)
            except OSError as error:
                raise _failed(f"{header.file}: {header.name}", error) from error
            if got == 0:
                raise _short(header, f"the file ended {count - done} bytes early while it was read")
            done += got

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Fill a contiguous CPU tensor from element ``start_elem`` on; no temporary is made.

        Elements are those of ``out``, whose dtype decides how the bytes are taken.

        Raises:
            ValueError: ``out`` is not contiguous, not on the CPU, or longer than what is there.
        """
        if not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError("read_into needs a contiguous CPU tensor")
        size = out.element_size()
        count = out.numel() * size
        if start_elem < 0 or start_elem * size + count > header.nbytes:
            raise ValueError(f"{header.name}: the tensor does not have that many elements")
        self._fill(header, out, start_elem * size, count)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in memory of its own."""
        header = self._header(name)
        shape = torch_shape(header.dtype, tuple(header.shape))
        out = torch.empty(shape, dtype=torch_dtype(header.dtype, name))
        self.read_into(header, out)
        return out

    def mapped(self, name: str) -> Tensor:
        """The tensor as private pages of the file: no copy, writes do not reach the file.

        What no element boundary allows to map, and an empty tensor, is read as by :meth:`tensor`.
        """
        header = self._header(name)
        dtype = torch_dtype(header.dtype, name)
        shape = torch_shape(header.dtype, tuple(header.shape))
        if header.nbytes == 0 or header.start % dtype.itemsize:
            return self.tensor(name)
        descriptor = self._open(header.file)
        with self._lock:
            file = self._maps.get(header.file)
            if file is None:
                try:
                    file = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:  # ValueError: the file is empty by now.
                    raise _failed(header.file, error) from error
                self._maps[header.file] = file
        if header.stop > len(file):
            raise _short(header, f"it ends at byte {header.stop}, the file at {len(file)}")
        with self._lock:
            part = (header.file, header.start, header.stop)
            view = self._views.get(part)
            if view is None:
                self._views[part] = view = memoryview(file)[header.start : header.stop]
                # Tensors hold on to the view: when it goes, nothing can see its pages any more.
                weakref.finalize(view, _leave, file, header.start, header.stop).atexit = False
        return torch.frombuffer(view, dtype=dtype).reshape(shape)

    def _lend(self, count: int) -> tuple[Tensor, Tensor]:
        """Two buffers of at least ``count`` bytes, aligned for any dtype."""
        with self._lock:
            while self._pairs:
                pair = self._pairs.pop()
                if pair[0].numel() >= count:
                    return pair
        size = max(count, self._buffer_bytes)
        one, two = (torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2))
        return one, two

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, block)`` of at most ``rows`` rows; a block is valid until the next one.

        Two buffers are in use: one with the caller, one being filled.

        Raises:
            ValueError: the tensor has no rows to speak of: it is a scalar.
        """
        with self._lock:
            begun, self._begun = self._begun, None
        if begun is not None and (begun.name, begun.asked) == (name, rows):
            blocks = begun
        else:
            if begun is not None:
                self._leave_off(begun)
            blocks = self._blocks(name, rows)
        try:
            start = 0
            while start < blocks.total:
                block = blocks.next(start, self._ahead)
                yield start, block
                start += block.shape[0]
        finally:
            self._leave_off(blocks)

    def begin(self, name: str, rows: int) -> None:
        """Read the first block of what ``row_blocks(name, rows)`` is asked for next."""
        with self._lock:
            if self._begun is not None:
                return
        blocks = self._blocks(name, rows)
        if blocks.total:
            blocks.fetch(0, self._ahead)
            with self._lock:
                self._begun = blocks

    def _blocks(self, name: str, rows: int) -> _Blocks:
        header = self._header(name)
        dtype = torch_dtype(header.dtype, name)
        shape = torch_shape(header.dtype, tuple(header.shape))
        if not shape:
            raise ValueError(f"{name} is a scalar and has no rows")
        total, rest = shape[0], shape[1:]
        width = header.nbytes // max(1, total)
        count = min(max(1, rows), total)
        pair = self._lend(count * width)
        buffers = [buffer[: count * width].view(dtype).reshape(count, *rest) for buffer in pair]

        def read(index: int, start: int) -> Tensor:
            block = buffers[index][: min(count, total - start)]
            self._fill(header, block, start * width, block.shape[0] * width)
            return block

        return _Blocks(name, rows, total, count, pair, read)

    def _leave_off(self, blocks: _Blocks) -> None:
        # A caller may leave early. What is still being read then is read before anything else
        # that these buffers are used for: there is one thread, and it works in order.
        if blocks.pending is not None:
            blocks.pending.cancel()
        with self._lock:
            if not self._closed:
                self._pairs.append(blocks.pair)


@dataclass(slots=True)
class _Blocks:
    """A tensor that is read by blocks of ``count`` rows, in turn into a pair of buffers."""

    name: str
    asked: int
    """Rows that the caller asked for."""
    total: int
    count: int
    pair: tuple[Tensor, Tensor]
    read: Callable[[int, int], Tensor]
    """Fill a buffer of the pair with the rows from one on."""
    pending: Future[Tensor] | None = None

    def fetch(self, start: int, hand: ThreadPoolExecutor) -> None:
        """Begin to read the block from row ``start`` on."""
        self.pending = hand.submit(self.read, start // self.count % 2, start)

    def next(self, start: int, hand: ThreadPoolExecutor) -> Tensor:
        """The block from row ``start`` on; the one after it is being read then."""
        if self.pending is None:
            self.fetch(start, hand)
        assert self.pending is not None
        block = self.pending.result()
        self.pending = None
        if start + block.shape[0] < self.total:
            self.fetch(start + block.shape[0], hand)
        return block


def _leave(file: mmap.mmap, start: int, stop: int) -> None:
    """Let the system drop the whole pages of a part that was mapped and is not used any more."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    count = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
    if count > 0:
        file.madvise(mmap.MADV_DONTNEED, first, count)


def _failed(where: str, error: Exception) -> QuantmillError:
    cause = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    fix = "check the rights of the file and the disk"
    return QuantmillError(codes.READ_FAILED(where, cause, fix))


def _short(header: TensorHeader, cause: str) -> QuantmillError:
    fix = "something shortened the file after its header was read: get it again and leave it alone"
    return QuantmillError(codes.READ_SHORT(f"{header.file}: {header.name}", cause, fix))
