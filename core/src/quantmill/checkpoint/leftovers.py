"""Temporary folders of writers that were killed: the next writer for the same output removes them.

A writer holds a lock on its folder as long as it lives; the system drops the lock with the process,
however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["hold", "remove_leftovers"]


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Hold the lock of an existing folder; False where another process has it, or the file system
    has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove folders of that beginning whose writer is gone."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        # Another process may be removing it at the same time, or it belongs to another user.
        with contextlib.suppress(OSError), hold(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
