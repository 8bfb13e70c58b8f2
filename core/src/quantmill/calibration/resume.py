"""Resuming: what a calibrated job has finished lies beside its output until the job ends.

One file per finished block, in the layouts that are written in the end anyway, and one with the
inputs of the next block. A file appears under its name when it is whole. A job with another
source, config, data, seed or version does not touch what it finds: it is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantmill.findings import QuantmillError, declare

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Progress", "fingerprint"]

OTHER_JOB = declare("QM-CALIB-030", "An unfinished job with another config lies at the output")
_ABOUT = "job.json"
_INPUTS = "inputs.safetensors"


def fingerprint(parts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able data that tells one job from another."""
    data: dict[str, Any] = json.loads(json.dumps(parts, sort_keys=True, default=str))
    return data


class Progress:
    """The folder of an unfinished job; with ``None`` nothing is kept."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        """Raises QuantmillError if the folder belongs to another job."""
        self.folder = folder
        self.finished = 0
        """Blocks whose files are whole."""
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _ABOUT
        wanted = fingerprint(about)
        if path.is_file():
            self._compare(json.loads(path.read_text(encoding="utf-8")), wanted)
        else:
            _replace(path, json.dumps(wanted, indent=2, sort_keys=True).encode())
        while (folder / _block(self.finished)).is_file():
            self.finished += 1
        # Without the inputs that follow the last block there is nothing to go on from.
        if self.finished and self._inputs_index() != self.finished:
            self.finished = self._inputs_index()

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if differing:
            raise QuantmillError(
                OTHER_JOB(
                    str(self.folder),
                    "it differs in " + ", ".join(differing),
                    "run the command it was started with, or remove that folder",
                )
            )

    def _inputs_index(self) -> int:
        assert self.folder is not None
        path = self.folder / _INPUTS
        if not path.is_file():
            return 0
        with safe_open(path, "pt") as stored:
            return int((stored.metadata() or {}).get("block", "0"))

    def save(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        about: Mapping[str, Any],
        hidden: list[Tensor],
    ) -> None:
        """Keep what block ``index`` became, and the inputs of the next."""
        if self.folder is None:
            return
        inputs = {f"{number:06}": tensor.contiguous() for number, tensor in enumerate(hidden)}
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(_block(index), whole, {"about": json.dumps(about)})
        # Written last: its number says how many blocks count.
        self._write(_INPUTS, inputs, {"block": str(index + 1)})
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

    def inputs(self) -> list[Tensor]:
        """Inputs of the block after the last finished one."""
        assert self.folder is not None
        stored = load_file(self.folder / _INPUTS)
        return [stored[name] for name in sorted(stored)]

    def remove(self) -> None:
        """The job has ended well."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _block(index: int) -> str:
    return f"block-{index:05}.safetensors"


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
