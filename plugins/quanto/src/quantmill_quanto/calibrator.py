"""Scales of activations from calibration data, as it streams through the blocks.

As in optimum-quanto: the largest magnitude of each batch over the largest code, averaged with a
momentum of 0.9 over the batches. Outputs are those of the quantized weight. Where several processes
share the batches, the first one's decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import BlockCalibrator
from quantmill.calibration.block import Block
from quantmill.forms import Affine, Form, ScaledFloat
from quantmill.targeting.types import Target
from quantmill_quanto.config import QuantoConfig
from quantmill_quanto.forms import joined
from quantmill_quanto.quantizer import QuantoQuantizer

__all__ = ["MOMENTUM", "QuantoCalibrator"]

MOMENTUM = 0.9


class _InMemory:
    """A weight of a block, as a :class:`quantmill.backend.WeightSource`."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.shape, self.dtype = name, tuple(weight.shape), weight.dtype
        self._weight = weight

    def tensor(self) -> Tensor:
        return self._weight

    def row_blocks(self, multiple: int = 1) -> Any:
        yield 0, self._weight


class _Scale:
    """A running average of the largest magnitudes."""

    def __init__(self, top: float) -> None:
        self.top = top
        self.value: float | None = None

    def take(self, values: Tensor) -> None:
        """Take a batch in."""
        if not values.numel():
            return
        found = float(values.abs().max()) / self.top
        self.value = found if self.value is None else MOMENTUM * self.value + (1 - MOMENTUM) * found


class QuantoCalibrator(BlockCalibrator[QuantoConfig]):
    """Rounds weights, then measures inputs and outputs of the block that they make."""

    def calibrate(self, block: Block) -> None:
        for target in block.targets:
            block.put(target, self._weight(block, target))
        inputs, outputs = self._measure(block)
        for target in block.targets:
            form: Any = block.forms[target.name]
            dtype = form.scale.dtype
            pair = [
                torch.tensor(found.get(target.name) or 1.0, dtype=dtype, device=self.device)
                for found in (inputs, outputs)
            ]
            block.put(target, joined(form, (pair[0], pair[1])))

    def _weight(self, block: Block, target: Target) -> Form:
        config = block.configs[target.name]
        assert isinstance(config, QuantoConfig)
        maker = QuantoQuantizer(config, device=self.device, kernels=self.kernels)
        form = maker.quantize(target, _InMemory(target.weight_name, block.weight(target)))
        assert isinstance(form, Affine | ScaledFloat)
        return form

    def _measure(self, block: Block) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, outputs, observers = {}, {}, {}
        for target in block.targets:
            config = block.configs[target.name]
            assert isinstance(config, QuantoConfig)
            inputs[target.name] = _Scale(config.top)
            outputs[target.name] = _Scale(config.top)
            observers[target.name] = self._observer(
                block, target, inputs[target.name], outputs[target.name]
            )
        block.observe(observers)
        found: list[dict[str, Any]] = block.agree(
            lambda: [{n: s.value for n, s in part.items()} for part in (inputs, outputs)]
        )
        return found[0], found[1]

    @staticmethod
    def _observer(
        block: Block, target: Target, into: _Scale, out: _Scale
    ) -> Callable[[Tensor, int], None]:
        def seen(x: Tensor, batch: int) -> None:
            into.take(x)
            bias: Any = getattr(block.linear(target), "bias", None)
            out.take(torch.nn.functional.linear(x, block.weight(target).to(x.dtype), bias))

        return seen
