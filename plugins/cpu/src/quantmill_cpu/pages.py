"""Memory for weights, in pages of 2 MiB where these come as fast as small ones.

Products read a weight from large pages 10 to 20 % faster. But a virtual machine may have given its
free large pages back to its host, and gets them again by small ones, at several times what it
takes to clear memory that it still has: loading a model would take half as long again. So the
first large page of each weight is timed. While they come slowly, weights are written into small
pages, and the system may join these to large ones when it has nothing else to do.
"""

from __future__ import annotations

import ctypes
import time
from typing import Final

import torch
from torch import Tensor

from quantmill_cpu.native import library

__all__ = ["Supply", "large_pages", "weight_memory", "written"]

_PAGE: Final = 2 << 20
_SLOW: Final = 1_000_000
"""Nanoseconds for a large page that are too many: the small ones in its place take fewer."""
_PAUSE: Final = 64 << 20
"""Bytes that are taken in small pages after a slow large one; twice as many after the next, and
again half as many after a fast one."""
_LONGEST: Final = 512 << 20


def large_pages(size: int) -> Tensor:
    """uint8 ``[size]``, not filled, in pages of 2 MiB where the system has them."""
    memory = torch.empty(size, dtype=torch.uint8)
    written(memory)
    return memory


def written(memory: Tensor) -> None:
    """Let the system put what is in small pages into large ones as well."""
    library().qm_large_pages(memory.data_ptr(), memory.numel())


class Supply:
    """Decides between large and small pages by how long the last large one took."""

    def __init__(self) -> None:
        self._small = 0  # bytes still to be taken in small pages
        self._pause = _PAUSE

    def take(self, size: int) -> Tensor:
        """uint8 ``[size]``, not filled; call :func:`written` when it is."""
        if self._small > 0:
            self._small -= size
            return torch.empty(size, dtype=torch.uint8)
        memory = large_pages(size)
        first = -(-memory.data_ptr() // _PAGE) * _PAGE
        if first + _PAGE <= memory.data_ptr() + size:
            start = time.perf_counter_ns()
            ctypes.memset(first, 0, 1)
            self.note(time.perf_counter_ns() - start)
        return memory

    def note(self, nanoseconds: int) -> None:
        """What the first write to a large page took."""
        if nanoseconds > _SLOW:
            self._small, self._pause = self._pause, min(2 * self._pause, _LONGEST)
        else:
            self._pause = max(_PAUSE, self._pause // 2)


weight_memory: Final = Supply()
"""Of this process."""
