"""Large tensors in memory of their own while a model is calibrated.

The C library keeps freed memory for later, in one heap per thread; the batches of a block run in
threads of their own, so that these heaps grow with every block by what fits into none of their
holes. Allocations that are mapped one by one go back to the system when they are freed: the peak
is then what is really held, whatever the number of blocks. Elsewhere than with glibc nothing is
done.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["give_back", "mapped_apart"]

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of ``mallopt(3)``."""
_LARGE = 1 << 20
"""Least bytes of an allocation that is mapped; the page faults of smaller ones would be felt."""
_USUAL = 32 << 20
"""Where glibc's own, moving threshold ends up in a program that frees large blocks."""


@contextmanager
def mapped_apart() -> Iterator[None]:
    """Map allocations of a MiB or more one by one for a while."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)


def give_back() -> None:
    """Return the free pages of all heaps to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
