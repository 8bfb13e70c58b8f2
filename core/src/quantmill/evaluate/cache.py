"""The folder of cached references, and the recipe that keeps two models out of memory at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill.evaluate.reference import ReferenceLogits, ReferenceSpec
from quantmill.evaluate.run import ModelFn, Progress, evaluate
from quantmill.evaluate.writer import ReferenceWriter
from quantmill.findings import Findings, QuantmillError, Severity, declare

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ReferenceCache", "cache_folder", "cached_reference"]

IGNORED = declare("QM-EVAL-010", "A cached reference is unusable and ignored", Severity.WARNING)


def cache_folder() -> Path:
    r"""``$QUANTMILL_CACHE`` if set, otherwise quantmill's folder in the platform's cache folder.

    That is ``$XDG_CACHE_HOME/quantmill`` or ``~/.cache/quantmill``, on macOS
    ``~/Library/Caches/quantmill``, on Windows ``%LOCALAPPDATA%\\quantmill``. Nothing is created.
    """
    chosen = os.environ.get("QUANTMILL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "quantmill"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quantmill"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "quantmill"


class ReferenceCache:
    """References by specification, in ``<folder>/reference-logits/<key>.qmref``.

    Entries are never evicted: a file holds its specification, and may be deleted at any time.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = (cache_folder() if folder is None else Path(folder)) / "reference-logits"

    def path(self, spec: ReferenceSpec) -> Path:
        """Where the reference of that specification is or would be."""
        return self.folder / f"{spec.key}.qmref"

    def find(self, spec: ReferenceSpec, findings: Findings | None = None) -> ReferenceLogits | None:
        """The stored reference, checked in full, or None if there is none that can be used.

        An unusable file adds the warning ``QM-EVAL-010`` to ``findings`` and counts as absent.
        """
        path = self.path(spec)
        if not path.exists():
            return None
        try:
            found = ReferenceLogits.open(path)
        except QuantmillError as error:
            cause = error.findings[0].cause
        else:
            if found.spec == spec:
                return found
            cause = "the file was computed for another model or text"
        if findings is not None:
            fix = "nothing to do: the reference is computed again and the file replaced"
            findings.add(IGNORED(str(path), cause, fix))
        return None

    def writer(self, spec: ReferenceSpec) -> ReferenceWriter:
        """A writer that creates or replaces the entry of that specification."""
        return ReferenceWriter(self.path(spec), spec)


def cached_reference(
    spec: ReferenceSpec,
    tokens: Tensor,
    load: Callable[[], ModelFn],
    *,
    cache: ReferenceCache | None = None,
    findings: Findings | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> ReferenceLogits:
    """The reference of ``spec`` from the cache, computed first if it is not there.

    ``load`` is called only on a miss and its model is released before this returns, so that the
    caller can load the model to compare afterwards.

    Args:
        spec: made with :meth:`ReferenceSpec.of` from the same ``tokens``.
        tokens: int64 [n].
        load: returns the reference model as a function int64 [B, T] -> logits [B, T, V].
        cache: default: the cache of the user.
        findings: receives the warning about an unusable entry.
        batch_size: windows per forward pass on a miss.
        progress: as for :func:`quantmill.evaluate.evaluate`.

    Raises:
        QuantmillError: what :func:`quantmill.evaluate.evaluate` and the writer raise.
    """
    store = ReferenceCache() if cache is None else cache
    found = store.find(spec, findings)
    if found is not None:
        return found
    with store.writer(spec) as writer:
        evaluate(
            load(),
            tokens,
            protocol=spec.protocol,
            context=spec.context,
            max_windows=spec.max_windows,
            bos_id=spec.bos_id,
            collect_reference=writer,
            batch_size=batch_size,
            progress=progress,
        )
    return writer.commit()
