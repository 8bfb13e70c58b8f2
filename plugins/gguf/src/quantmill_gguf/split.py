"""One file, or a split of several: the same interface, and all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill_gguf.writer import GgufWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SplitWriter"]


class SplitWriter:
    """Tensors in any order, each to the file it belongs to.

    A split's files are ``NAME-00001-of-00003.gguf``; the first has the metadata.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        kinds: Mapping[str, str | int],
        max_bytes: int | None,
    ) -> None:
        groups = _groups(tensors, max_bytes)
        self._writers: list[GgufWriter] = []
        self._owner: dict[str, GgufWriter] = {}
        for index, group in enumerate(groups):
            mine = dict(metadata) if index == 0 else {}
            names: dict[str, str | int] = dict(kinds)
            where = path
            if len(groups) > 1:
                mine |= {
                    "split.no": index,
                    "split.count": len(groups),
                    "split.tensors.count": len(tensors),
                }
                names |= {"split.no": "uint16", "split.count": "uint16"}
                names["split.tensors.count"] = "int32"
                number = f"{index + 1:05}-of-{len(groups):05}"
                where = path.with_name(f"{path.stem}-{number}{path.suffix}")
            writer = GgufWriter(where, mine, group, kinds=names)
            self._writers.append(writer)
            self._owner.update(dict.fromkeys((item.name for item in group), writer))

    def __enter__(self) -> SplitWriter:
        opened: list[GgufWriter] = []
        try:
            for writer in self._writers:
                opened.append(writer.__enter__())
        except BaseException:
            for writer in opened:
                writer.discard()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove what was not committed."""
        for writer in self._writers:
            writer.discard()

    def put(self, name: str, raw: Tensor, at: int = 0) -> None:
        """Bytes of a tensor, from byte ``at`` of it on."""
        self._owner[name].put(name, raw, at)

    def commit(self) -> list[Path]:
        """Finish every file, then name them, the first one last: a reader starts there.

        Raises:
            QuantmillError: a file can't be written.
            ValueError: a tensor is not complete.
        """
        for writer in self._writers:
            writer.finish()
        for writer in reversed(self._writers):
            writer.publish()
        return [writer.path for writer in self._writers]


def _groups(tensors: Sequence[TensorSpec], most: int | None) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    held = 0
    for item in tensors:
        if most is not None and groups[-1] and held + item.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += item.nbytes
    return groups
