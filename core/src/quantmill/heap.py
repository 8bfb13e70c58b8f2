"""The C library's heap, where large tensors come and go.

By default glibc maps large tensors one by one and gives each back at once: every intermediate
result of every batch of a calibration would be paged in anew, which took a fifth of the time. And
it keeps one heap per thread, where what lies free in one is lost to the others. So :func:`one_heap`
keeps what is freed for the next batch, in one heap, which stays so for as long as the process
lives. :func:`give_back` returns what is free wherever memory would otherwise run high: while a
model is loaded, float weights leave holes between the packed ones. Elsewhere than with glibc
nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

__all__ = ["LARGE", "give_back", "one_heap"]

# Numbers of mallopt(3).
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
LARGE = 32 << 20
"""Least bytes of an allocation that is mapped by itself: the most that glibc allows."""
_KEPT = 1 << 30
"""Bytes at the end of the heap that wait for the next batch."""
_USUAL = 2 * LARGE
"""Where glibc's own, moving threshold ends up in a program that frees large blocks."""


@contextmanager
def one_heap() -> Iterator[None]:
    """Let all threads share one heap, and keep what they free for a while."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_MMAP_THRESHOLD, LARGE)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, _USUAL)
        give_back()


def give_back(beyond: int = 0) -> None:
    """Return the free pages of the heap to the system, where it holds more than ``beyond`` bytes
    that are free: those that will soon be wanted again cost more than they are worth."""
    library = _glibc()
    if library is not None and (beyond == 0 or _free_bytes(library) > beyond):
        library.malloc_trim(0)


class _Heap(ctypes.Structure):
    """What mallinfo2(3) tells."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _free_bytes(library: ctypes.CDLL) -> int:
    """Bytes that are free in the heap, whether the system has their pages or not."""
    try:
        mallinfo = library.mallinfo2
    except AttributeError:  # before glibc 2.33
        return sys.maxsize
    mallinfo.restype = _Heap
    return int(mallinfo().fordblks)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
