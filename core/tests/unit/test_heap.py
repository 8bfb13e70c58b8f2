"""The C library's heap: what is kept for the next batch, and what goes back to the system."""

import os
import sys
from pathlib import Path

import pytest
import torch

from quantmill.heap import give_back, one_heap

SIZE = 96 << 20
PIECE = 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_free_pages_stay_until_they_are_too_many() -> None:
    with one_heap():
        before = resident_bytes()
        pieces = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(SIZE // PIECE)]
        fence = torch.ones(1 << 20, dtype=torch.uint8)  # holes, not the heap's end
        used = resident_bytes()
        if used - before < SIZE // 2:
            pytest.skip("this system doesn't count pages so")
        pieces.clear()
        give_back(beyond=1 << 40)
        assert used - resident_bytes() < SIZE // 4
        give_back(beyond=SIZE // 2)
        assert used - resident_bytes() > SIZE // 2
        del fence
