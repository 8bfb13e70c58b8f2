"""How many bytes of tensors are there at once, while some code runs."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakBytes"]


class PeakBytes(TorchDispatchMode):
    """Counts the storages that PyTorch's operations make, as long as each lives."""

    bytes: int
    """The most that were there at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> PeakBytes:
        self.bytes = self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            item.untyped_storage()._cdata
            for item in tree_leaves((args, kwargs or {}))
            if isinstance(item, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and not item.is_meta:
                storage = item.untyped_storage()
                if storage._cdata not in given:
                    self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self._now -= size

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.bytes = max(self.bytes, self._now)
