"""Tied weights, as the checkpoint has them: tying is symmetric, and sometimes contradicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.checkpoint.reader import TensorReader
from quantmill.stages.quantize import open_reader

__all__ = ["Ties"]

_ROWS = 4096


class Ties:
    """Pairs of parameters that share storage.

    Whichever of the two is stored is the source. Where both are stored, transformers ties them
    only if they are equal: until :meth:`compare` has looked, both count as weights of their own,
    so that a plan reads nothing and a copied checkpoint loses nothing.
    """

    def __init__(
        self,
        declared: Mapping[str, str] | None,
        sources: Callable[[str], tuple[str, ...]],
        headers: CheckpointHeaders,
        quantized: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """``declared`` maps targets to sources, ``sources`` gives a parameter's tensors, and
        ``quantized`` says of one without any whether it is stored in another form."""
        self._declared = dict(declared or {})
        self._sources = sources
        self._headers = headers
        self._quantized = quantized
        self._equal: set[str] = set()

    @property
    def mapping(self) -> dict[str, str]:
        """Parameter without storage of its own to the one whose storage it shares."""
        found = {}
        for target, source in self._declared.items():
            if self._stored(target) and not self._stored(source):
                target, source = source, target
            if not self._stored(target) or target in self._equal:
                found[target] = source
        return found

    def _stored(self, name: str) -> bool:
        return bool(self._sources(name)) or self._quantized(name)

    def partner(self, name: str) -> str | None:
        """The parameter that ``name`` is declared to be tied to, in either direction."""
        if name in self._declared:
            return self._declared[name]
        return next((t for t, source in self._declared.items() if source == name), None)

    def compare(self) -> None:
        """Find out which of the weights that are stored twice are equal."""
        pairs = [
            (target, self._sources(target)[0], self._sources(source)[0])
            for target, source in self._declared.items()
            if len(self._sources(target)) == len(self._sources(source)) == 1
        ]
        if pairs:
            with open_reader(self._headers) as one, open_reader(self._headers) as two:
                self._equal = {name for name, a, b in pairs if self._same(one, two, a, b)}

    def _same(self, one: TensorReader, two: TensorReader, a: str, b: str) -> bool:
        first, second = self._headers.tensors[a], self._headers.tensors[b]
        if a == b or first.shape != second.shape or first.dtype != second.dtype:
            return a == b
        if not first.shape:
            return torch.equal(one.tensor(a), two.tensor(b))
        blocks = zip(one.row_blocks(a, _ROWS), two.row_blocks(b, _ROWS), strict=True)
        return all(torch.equal(x, y) for (_, x), (_, y) in blocks)
