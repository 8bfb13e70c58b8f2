"""GPTQ (arXiv 2210.17323) over the blocks of a model: which linears meet which inputs, and when."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.backend import BlockCalibrator
from quantmill.calibration.block import Block
from quantmill.calibration.moments import Moments
from quantmill.config import group_width
from quantmill.forms import Form
from quantmill.targeting.types import Target
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.factor import EXACT
from quantmill_gptq.rounding import grid_of, rounded
from quantmill_gptq.solver import Problem, gptq

__all__ = ["GptqCalibrator"]


class GptqCalibrator(BlockCalibrator[GptqConfig]):
    """One Hessian, and one factor of it, for all linears that share an input."""

    def calibrate(self, block: Block) -> None:
        groups = block.call_order()
        if self.config.true_sequential:
            block.in_order(groups, lambda n, moments: self._quantize(block, groups[n], moments))
            return
        for group, moments in zip(groups, block.moments(groups), strict=True):
            self._quantize(block, group, moments)
            moments.free()

    def exact_inputs(self, config: GptqConfig) -> bool:
        return config.gptaq_alpha > 0

    def working_bytes(self, targets: Sequence[Target]) -> int:
        # The moments, the same in order, and the factor with what it is made of, in float64 up to
        # a width; then the first three, and the weight in float32, turned, and what it lacks.
        widest = max(target.in_features for target in targets)
        factoring = (24 if widest <= EXACT else 16) * widest**2
        return max(factoring, 12 * widest**2 + 24 * max(target.weights for target in targets))

    def _quantize(self, block: Block, group: list[Target], moments: Moments) -> None:
        problems: dict[tuple[object, ...], Problem] = {}

        def quantize(target: Target) -> tuple[Form, float | None]:
            config = block.configs[target.name]
            assert isinstance(config, GptqConfig)
            weight = block.weight(target)
            width = group_width(config.group_size, target.in_features)
            if moments.tokens == 0:
                # No token reached it (an expert that was never routed to): nothing to learn from.
                whole = weight.float()
                grid = grid_of(whole, width, config)
                return rounded(whole, grid, width, config, weight.dtype), None
            key = Problem.key(config, width)
            if key not in problems:
                problems[key] = Problem(moments.square, config, width, target.weight_name)
            return gptq(weight, problems[key], config, self.kernels, moments.cross)

        block.make(group, quantize)
