"""AWQ (arXiv 2306.00978) over the blocks of a model.

For linears that share an input, columns are multiplied by ``s = x ** a / w ** (1 - a)`` (mean
magnitudes of inputs and weights), the exponent chosen by the error of the output; then ranges are
clipped group by group; then weights are rounded to nearest. Exponents are tried on evenly spaced
rows. Output errors are exact quadratic
forms of the inputs' second moments, so that no candidate needs a run of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import BlockCalibrator
from quantmill.calibration.block import Block
from quantmill.calibration.loss import SEARCHED, evenly, relative_loss
from quantmill.calibration.moments import Moments
from quantmill.config import group_width
from quantmill.forms import Form
from quantmill.targeting.types import Target
from quantmill_awq.config import AwqConfig
from quantmill_awq.folding import Fold, find_fold
from quantmill_awq.rounding import make_form, nearest, ranges

__all__ = ["AwqCalibrator"]

_SHARES = 10
_LEAST = 0.5
"""Ranges are tried from the full one down to half, in this many steps."""


class AwqCalibrator(BlockCalibrator[AwqConfig]):
    """Scales first, for the whole block; then clipping and rounding, linear by linear."""

    def calibrate(self, block: Block) -> None:
        groups = block.call_order()
        moments = block.moments(groups, magnitudes=True)
        folds = block.agree(lambda: _folds(block, groups))
        device = moments[0].square.device

        def search(number: int) -> Tensor | None:
            if folds[number] is None or not moments[number].tokens:
                return None
            fold = Fold.from_data(folds[number], device)
            return self._search(block, groups[number], moments[number], fold)

        # A search sees the weights of its own linears only: none waits for another.
        scales = block.spread(len(groups), search)
        for group, found, data, scale in zip(groups, moments, folds, scales, strict=True):
            if scale is not None:
                _apply(block, group, found, Fold.from_data(data, device), scale)
        by_target = {
            target.name: found
            for group, found in zip(groups, moments, strict=True)
            for target in group
        }
        block.make(block.targets, lambda target: _round(block, target, by_target[target.name]))

    def working_bytes(self, targets: Sequence[Target]) -> int:
        # The moments of all inputs of the block, then a weight in float32 with what is tried.
        widths = {(target.module.name.rpartition(".")[0], target.in_features) for target in targets}
        moments = sum(4 * width**2 for _, width in widths)
        return moments + 36 * max(target.weights for target in targets)

    def _search(
        self, block: Block, group: Sequence[Target], moments: Moments, fold: Fold
    ) -> Tensor | None:
        """The best scales ``[in]``, or None when none beats plain rounding."""
        config = block.configs[group[0].name]
        assert isinstance(config, AwqConfig)
        weights = [block.weight(target) for target in group]
        sample = [weight[evenly(weight.shape[0], weight.device, SEARCHED)] for weight in weights]
        together = torch.cat(sample).to(torch.float32)
        inputs = moments.magnitude.clamp(min=1e-8)
        magnitude = _magnitude(together, group_width(config.group_size, together.shape[1]))
        best, chosen = _error(together, moments.square, config), None
        for step in range(1, config.grid + 1):
            share = step / config.grid
            for mix in (0.0, 1.0 - share):
                scale = inputs.pow(share) / magnitude.pow(mix)
                scale = fold.reduce(scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
                error = _error(together, moments.square, config, scale)
                if error < best:
                    best, chosen = error, scale
        return chosen


def _folds(block: Block, groups: Sequence[Sequence[Target]]) -> list[list[Any] | None]:
    """Where the inverse of each group's scales can go, as JSON-able data."""
    found = (find_fold(block, group) for group in groups)
    return [None if fold is None else fold.to_data() for fold in found]


def _apply(
    block: Block, group: Sequence[Target], moments: Moments, fold: Fold, scale: Tensor
) -> None:
    """Divide the giver's output by ``scale``, and multiply the columns that read it."""
    giver = block.model.get_submodule(fold.module)
    for local, value in fold.changes(giver, scale).items():
        block.change(f"{fold.module}.{local}", value)
    for target in group:
        weight = block.weight(target)
        weight.mul_(scale.to(weight.dtype))
    moments.square.div_(scale.unsqueeze(0)).div_(scale.unsqueeze(1))
    moments.magnitude.div_(scale)


def _round(block: Block, target: Target, moments: Moments) -> tuple[Form, float | None]:
    config = block.configs[target.name]
    assert isinstance(config, AwqConfig)
    stored = block.weight(target)
    weight = stored.to(torch.float32)
    share = _clip(weight, moments, config) if config.clip and moments.tokens else None
    form = make_form(weight, config, stored.dtype, share)
    if not moments.tokens:
        return form, None
    # The weight in the block is still the float one, with its scales folded in.
    return form, relative_loss(stored, form, moments.square)


def _magnitude(weight: Tensor, width: int) -> Tensor:
    """Mean over rows of each column's magnitude within its group's range, ``[in]``."""
    rows, columns = weight.shape
    pad = -columns % width
    blocks = torch.nn.functional.pad(weight.abs(), (0, pad)).reshape(rows, -1, width)
    share = blocks / blocks.amax(dim=-1, keepdim=True).clamp(min=1e-8)
    return share.reshape(rows, -1)[:, :columns].mean(0).clamp(min=1e-4)


def _error(weight: Tensor, square: Tensor, config: AwqConfig, scale: Tensor | None = None) -> float:
    """Squared output error of rounding ``weight`` to nearest, its columns times ``scale``."""
    rows, columns = weight.shape
    width = group_width(config.group_size, columns)
    blocks = (weight if scale is None else weight * scale).reshape(rows, -1, width)
    error = (nearest(blocks, *ranges(blocks, config)) - blocks).reshape(rows, columns)
    if scale is not None:
        error /= scale
    return float((error @ square).mul_(error).sum())


def _clip(weight: Tensor, moments: Moments, config: AwqConfig) -> Tensor:
    """Share of each group's range to keep, ``[out, groups]``, by the error within the group."""
    rows, columns = weight.shape
    width = group_width(config.group_size, columns)
    blocks = weight.reshape(rows, -1, width)
    groups = blocks.shape[1]
    index = torch.arange(columns, device=weight.device).reshape(groups, width)
    square = moments.square[index.unsqueeze(2), index.unsqueeze(1)]  # [groups, width, width]
    best = torch.full((rows, groups), float("inf"), device=weight.device)
    chosen = torch.ones(rows, groups, device=weight.device)
    for step in range(_SHARES):
        share = 1.0 - step * (1.0 - _LEAST) / _SHARES
        scale, zero = ranges(blocks, config, share)
        error = nearest(blocks, scale, zero) - blocks
        turned = error.transpose(0, 1)  # [groups, rows, width]
        cost = (torch.bmm(turned, square) * turned).sum(-1).t()
        better = cost < best
        best = torch.where(better, cost, best)
        chosen = torch.where(better, torch.full_like(chosen, share), chosen)
    return chosen
