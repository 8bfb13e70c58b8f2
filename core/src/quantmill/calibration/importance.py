"""Importance of columns: how large the inputs of each linear are, on a text.

The mean square of an input is what the square of an error in its column costs, and a diagonal of
the second moments that calibrated methods use. Quantizers that only round take it as weights, and
files of it (importance matrices) outlive the model that they were measured with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import BlockCalibrator
from quantmill.calibration.block import NAN_ACTIVATION, Block
from quantmill.calibration.data import CalibrationData
from quantmill.calibration.engine import Run
from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError
from quantmill.job import Job
from quantmill.stages.quantize import open_reader

__all__ = ["Measured", "Squares", "measure"]

_COMPUTED = ("linear", "conv1d")


@dataclass(slots=True)
class Squares:
    """Of the inputs of one linear."""

    total: Tensor
    """Sum of their squares, float64 ``[in]``."""
    tokens: int = 0
    """How many inputs there were: of an expert, the tokens that were routed to it."""

    def add(self, inputs: Tensor, batch: int) -> None:
        """Inputs ``[tokens, in]`` of a batch."""
        # A batch adds up in float32, batches in float64.
        self.total += inputs.to(torch.float32).square().sum(0)
        self.tokens += inputs.shape[0]


@dataclass(slots=True)
class Measured:
    """What one text says of a model's linears."""

    windows: int
    length: int
    """Tokens of a window."""
    text: str
    """Name of the text."""
    squares: dict[str, Squares] = field(default_factory=dict)
    """By name of the module; of what no token reached too."""


def measure(job: Job, data: CalibrationData, text: str, *, head: bool = False) -> Measured:
    """Run the float model of a planned job on ``data``, block by block, and add up.

    Memory holds what calibration holds: one block, and the hidden states between two.

    Args:
        job: its plan says which linears are meant.
        data: windows of tokens.
        text: name of the text they are of.
        head: also what lies outside the blocks, such as the output head.

    Raises:
        QuantmillError: the model can't be replayed, or a weight or an activation is not finite.
    """
    found = Measured(data.tokens.shape[0], data.tokens.shape[1], text)
    with open_reader(job.headers) as reader:
        _Measuring(job, None, data, None, reader).measure(found, head)
    return found


class _Measuring(Run):
    """The engine of calibration with a calibrator that changes nothing."""

    def measure(self, found: Measured, head: bool) -> None:
        self._found, self._head = found, head
        self.calibrated = {
            name: pair for name, pair in self.targets.items() if pair[0].kind in _COMPUTED
        }
        self.run()

    def _calibrators(self) -> list[tuple[BlockCalibrator[Any], set[str]]]:
        return [(_Adding(self._add), set(self.calibrated))]

    def _add(self, block: Block) -> None:
        if block.module is block.model and not self._head:
            return
        made = {
            item.name: Squares(
                torch.zeros(item.in_features, dtype=torch.float64, device=block.weight(item).device)
            )
            for item in block.targets
        }
        block.pass_on({name: item.add for name, item in made.items()})
        for name, item in made.items():
            if not bool(torch.isfinite(item.total).all()):
                cause = "its input is NaN or infinite, or too large to be squared"
                fix = "use a dtype of wider range (--dtype float32), or other data"
                raise QuantmillError(NAN_ACTIVATION(name, cause, fix))
            item.total = item.total.to("cpu")
        self._found.squares |= made

    def _complete(self, block: Block) -> None:
        """No form is wanted."""


class _Adding(BlockCalibrator[MethodConfig]):
    def __init__(self, add: Callable[[Block], None]) -> None:
        self._add = add

    def calibrate(self, block: Block) -> None:
        self._add(block)
