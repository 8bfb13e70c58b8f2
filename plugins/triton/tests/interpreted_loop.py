"""The smallest kernel that loops as ours do."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count(out, times):
    total = 0.0
    for _ in range(times):
        total += 1.0
    tl.store(out, total)
