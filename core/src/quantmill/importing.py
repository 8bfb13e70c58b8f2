"""Imports of many modules at once.

PyTorch and transformers bring some three thousand modules, whose objects all stay. The garbage
collector looks through them again and again meanwhile, for a fifth of the time, and finds nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collector"]


@contextmanager
def without_collector() -> Iterator[None]:
    """Collect no garbage in between, and take what is there then for old."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # Straight into the oldest generation, without a look at each object.
            gc.freeze()
            gc.unfreeze()
        gc.enable()
