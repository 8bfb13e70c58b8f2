"""Resuming: what a calibrated job has finished lies beside its output until the job ends.

One file per finished block, in the layouts that are written in the end anyway, and one per process
with the inputs of the next block. A file appears under its name when it is whole, the block's after
the inputs that follow it: as many blocks count as have a file. A job with another source, config,
data, seed or version does not touch what it finds: it is refused. Another number of processes may
go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmill.findings import QuantmillError, declare

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.processes import Processes

__all__ = ["Progress", "fingerprint"]

OTHER_JOB = declare("QM-CALIB-030", "An unfinished job with another config lies at the output")
_ABOUT = "job.json"


def fingerprint(parts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able data that tells one job from another."""
    data: dict[str, Any] = json.loads(json.dumps(parts, sort_keys=True, default=str))
    return data


class Progress:
    """The folder of an unfinished job; with ``None`` nothing is kept."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any], processes: Processes) -> None:
        """Raises QuantmillError if the folder belongs to another job."""
        self.folder = folder
        self.finished = 0
        """Blocks whose files are whole."""
        self._processes = processes
        if folder is None:
            return
        self.finished, differing = processes.agree(lambda: self._open(folder, fingerprint(about)))
        if differing:
            raise QuantmillError(
                OTHER_JOB(
                    str(folder),
                    "it differs in " + ", ".join(differing),
                    "run the command it was started with, or remove that folder",
                )
            )

    @staticmethod
    def _open(folder: Path, wanted: Mapping[str, Any]) -> tuple[int, list[str]]:
        """Finished blocks, and what the folder's job has otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _ABOUT
        finished = 0
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            if differing:
                return 0, differing
        else:
            _replace(path, json.dumps(wanted, indent=2, sort_keys=True).encode())
        while (folder / _block(finished)).is_file():
            finished += 1
        return finished, []

    def save(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        about: Mapping[str, Any],
        hidden: Mapping[int, Tensor],
        exact: Mapping[int, Tensor],
    ) -> None:
        """Keep what block ``index`` became, and the inputs of the next by number of the batch
        (those of this process); those in the float model too, where they are needed."""
        if self.folder is None:
            return
        inputs = {
            _batch(number, kind): tensor.detach().cpu().contiguous()
            for kind, members in enumerate((hidden, exact))
            for number, tensor in members.items()
        }
        self._write(_inputs(index + 1, str(self._processes.rank)), inputs, {})
        self._processes.wait()
        if self._processes.first:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            self._write(_block(index), whole, {"about": json.dumps(about)})
            for path in self.folder.glob(_inputs(index, "*")):
                path.unlink()
        self.finished = index + 1

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        assert self.folder is not None
        temporary = self.folder / f".{name}.new"
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self.folder / name)

    def block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`save` kept of a block."""
        assert self.folder is not None
        path = self.folder / _block(index)
        with safe_open(path, "pt") as stored:
            about: dict[str, Any] = json.loads((stored.metadata() or {}).get("about", "{}"))
        return load_file(path), about

    def inputs(self, numbers: Sequence[int], exact: bool = False) -> dict[int, Tensor]:
        """Inputs of the block after the last finished one, of the batches ``numbers``; with
        ``exact`` those in the float model, if there are any."""
        assert self.folder is not None
        found: dict[int, Tensor] = {}
        for path in sorted(self.folder.glob(_inputs(self.finished, "*"))):
            with safe_open(path, "pt") as stored:
                there = set(stored.keys())
                for number in numbers:
                    name = _batch(number, exact)
                    if name in there:
                        found[number] = stored.get_tensor(name)
        return found

    def remove(self) -> None:
        """The job has ended well."""
        self._processes.wait()
        if self.folder is not None and self._processes.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self) -> None:
        """The job can't end well: nothing is worth going on from."""
        if self.folder is not None and self._processes.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def _batch(number: int, exact: int) -> str:
    return f"{number:06}.exact" if exact else f"{number:06}"


def _block(index: int) -> str:
    return f"block-{index:05}.safetensors"


def _inputs(index: int, process: str) -> str:
    return f"inputs-{index:05}-{process}.safetensors"


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
