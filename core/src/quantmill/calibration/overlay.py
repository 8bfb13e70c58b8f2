"""A reader that answers some tensors from memory: those that calibration changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.checkpoint.reader import TensorReader

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OverlayReader"]


class OverlayReader:
    """Reads like :class:`TensorReader`; ``changed`` tensors (by checkpoint name) win."""

    def __init__(self, reader: TensorReader, changed: Mapping[str, Tensor]) -> None:
        self._reader = reader
        self._changed = changed

    @property
    def changed(self) -> Mapping[str, Tensor]:
        """The tensors that are answered from memory."""
        return self._changed

    @property
    def headers(self) -> CheckpointHeaders:
        """Those of the checkpoint."""
        return self._reader.headers

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in memory of its own."""
        if name not in self._changed:
            return self._reader.tensor(name)
        stored = self._reader.headers.tensors[name]
        from quantmill.checkpoint.reader import torch_dtype

        changed = self._changed[name].detach().to("cpu", torch_dtype(stored.dtype, name))
        return changed.reshape(tuple(stored.shape)).clone()

    def mapped(self, name: str) -> Tensor:
        """As :meth:`tensor`: calibration writes into weights, and pages of a private map that were
        written to stay in memory as long as the file is open."""
        return self.tensor(name)

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Fill ``out`` from element ``start_elem`` on."""
        if header.name not in self._changed:
            self._reader.read_into(header, out, start_elem)
            return
        flat = self.tensor(header.name).reshape(-1)[start_elem : start_elem + out.numel()]
        out.copy_(flat.reshape(out.shape))

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, block)``."""
        if name not in self._changed:
            yield from self._reader.row_blocks(name, rows)
            return
        whole = self.tensor(name)
        for start in range(0, whole.shape[0], rows):
            yield start, whole[start : start + rows]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)
