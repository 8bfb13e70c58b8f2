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


def give_back() -> None:
    """Return the free pages of the heap to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
