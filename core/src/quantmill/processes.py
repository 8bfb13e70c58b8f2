"""The processes of one job: one, or those that ``torchrun`` started for the same command.

All of them run the same program on the same data and make the same decisions; what is costly is
shared, and what one of them made reaches the others byte for byte. What is summed over processes
is summed in an order that does not depend on how many there are: see
:mod:`quantmill.calibration.moments`.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmill.findings import QuantmillError, declare

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "Processes", "first_process", "local_device"]

LOST = declare("QM-PROCESS-001", "Another process of the job has ended")
_WAIT = datetime.timedelta(hours=12)
"""Longest wait for a process that quantizes a weight while the others have nothing to do."""


class Processes:
    """This process and its peers."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def from_environment(cls) -> Processes:
        """What ``torchrun`` says; joins the others. One alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            return ALONE
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(both, timeout=_WAIT)
            # Gloo's threads let go of the last tensors after the call that sent them. One that
            # does so while the interpreter ends takes the process down with it.
            atexit.register(_leave)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """The process that decides, writes, and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            self.agree(lambda: None)

    def agree(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives in the first process: JSON-able, the same for all."""
        made = make() if self.first else None
        return made if self.size == 1 else self._text(made, 0)

    def exchange(
        self, mine: tuple[Mapping[str, Tensor], Any] | None, owner: int, device: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Tensors by name and JSON-able data of process ``owner``, for all, on ``device``."""
        import torch

        if self.size == 1:
            assert mine is not None
            return dict(mine[0]), mine[1]
        listed: Any = None
        if self.rank == owner:
            assert mine is not None
            dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in mine[0].items()}
            shapes = {name: list(t.shape) for name, t in mine[0].items()}
            listed = [dtypes, shapes, mine[1]]
        dtypes, shapes, data = self._text(listed, owner)
        found = {}
        for name, dtype in dtypes.items():
            if self.rank == owner:
                assert mine is not None
                tensor = mine[0][name].to(device).contiguous()
            else:
                tensor = torch.empty(shapes[name], dtype=getattr(torch, dtype), device=device)
            # Bytes travel: not every backend knows every dtype.
            self.broadcast(tensor.reshape(-1).view(torch.uint8), owner)
            found[name] = tensor
        return found, data

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill ``tensor`` with that of process ``owner``.

        Raises:
            QuantmillError: a process has ended.
        """
        if self.size == 1:
            return
        from torch import distributed

        try:
            distributed.broadcast(tensor, owner)
        except RuntimeError as error:
            raise QuantmillError(
                LOST(
                    f"process {self.rank}",
                    f"it waited for process {owner}: {str(error).splitlines()[0]}",
                    "see what the other processes say; the same command goes on from here",
                )
            ) from None

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """``values`` of every process, in the order of processes; all of one length."""
        return [list(self._text(list(values), owner)) for owner in range(self.size)]

    def _text(self, data: Any, owner: int) -> Any:
        import torch

        if self.size == 1:
            return data
        text = json.dumps(data).encode() if self.rank == owner else b""
        length = torch.tensor([len(text)], dtype=torch.int64)
        self.broadcast(length, owner)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == owner:
            buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.broadcast(buffer, owner)
        return json.loads(buffer.numpy().tobytes())


ALONE = Processes()


def _leave() -> None:
    """End the threads of the group, unless the program has done so itself."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def first_process() -> bool:
    """Whether this process is the one that speaks, by what ``torchrun`` says."""
    return os.environ.get("RANK", "0") == "0"


def local_device(device: str) -> str:
    """``cuda`` as this process's own card of its machine."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local else device
