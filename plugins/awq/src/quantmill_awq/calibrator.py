"""AWQ (arXiv 2306.00978) over the blocks of a model.

For linears that share an input, columns are multiplied by ``s = x ** a / w ** (1 - a)`` (mean
magnitudes of inputs and weights), the exponent chosen by the error of the output; then ranges are
clipped group by group; then weights are rounded to nearest. Output errors are exact quadratic
forms of the inputs' second moments, so that no candidate needs a run of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantmill.backend import BlockCalibrator
from quantmill.calibration.block import Block
from quantmill.targeting.types import Target
from quantmill_awq.config import AwqConfig
from quantmill_awq.folding import Fold, find_fold
from quantmill_awq.rounding import group_width, make_form, nearest, ranges

__all__ = ["AwqCalibrator"]

_ROWS = 256
"""Rows of each weight on which exponents are tried."""
_SHARES = 10
_LEAST = 0.5
"""Ranges are tried from the full one down to half, in this many steps."""


class _Moments:
    """Second moments and mean magnitude of inputs ``[tokens, in]``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.square = torch.zeros(columns, columns, device=device)
        self.magnitude = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        work = inputs.to(torch.float32)
        count = self.tokens + work.shape[0]
        keep, gain = self.tokens / count, 1.0 / count
        self.square.mul_(keep).addmm_(work.t(), work, alpha=gain)
        self.magnitude.mul_(keep).add_(work.abs().sum(0), alpha=gain)
        self.tokens = count


class AwqCalibrator(BlockCalibrator[AwqConfig]):
    """Scales first, for the whole block; then clipping and rounding, linear by linear."""

    def calibrate(self, block: Block) -> None:
        groups = block.call_order()
        moments = {group[0].name: _Moments(group[0].in_features, self.device) for group in groups}
        block.observe({name: item.add for name, item in moments.items()})
        for group in groups:
            found = moments[group[0].name]
            if found.tokens:
                self._scale(block, group, found)
        for group in groups:
            for target in group:
                self._round(block, target, moments[group[0].name])

    def _scale(self, block: Block, group: Sequence[Target], moments: _Moments) -> None:
        fold = find_fold(block, group)
        if fold is None:
            return
        config = block.configs[group[0].name]
        assert isinstance(config, AwqConfig)
        scale = self._search(block, group, moments, fold, config)
        if scale is None:
            return
        model = block.model
        for local, value in fold.changes(model.get_submodule(fold.module), scale).items():
            block.change(f"{fold.module}.{local}", value)
        for target in group:
            weight = block.weight(target)
            weight.mul_(scale.to(weight.dtype))
        moments.square.div_(scale.unsqueeze(0)).div_(scale.unsqueeze(1))
        moments.magnitude.div_(scale)

    def _search(
        self,
        block: Block,
        group: Sequence[Target],
        moments: _Moments,
        fold: Fold,
        config: AwqConfig,
    ) -> Tensor | None:
        """The best scales ``[in]``, or None when none beats plain rounding."""
        sample = [_sample(block.weight(target).to(torch.float32)) for target in group]
        together = torch.cat(sample)
        inputs = moments.magnitude.clamp(min=1e-8)
        weights = _magnitude(together, group_width(config, together.shape[1]))
        best, chosen = _error(together, moments.square, config), None
        for step in range(1, config.grid + 1):
            share = step / config.grid
            for mix in (0.0, 1.0 - share):
                scale = inputs.pow(share) / weights.pow(mix)
                scale = fold.reduce(scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
                square = moments.square / scale.unsqueeze(0) / scale.unsqueeze(1)
                error = _error(together * scale, square, config)
                if error < best:
                    best, chosen = error, scale
        return chosen

    def _round(self, block: Block, target: Target, moments: _Moments) -> None:
        config = block.configs[target.name]
        assert isinstance(config, AwqConfig)
        stored = block.weight(target)
        weight = stored.to(torch.float32)
        share = _clip(weight, moments, config) if config.clip and moments.tokens else None
        form = make_form(weight, config, stored.dtype, share)
        loss = None
        if moments.tokens:
            error = form.dequantize(torch.float32) - weight
            energy = (weight @ moments.square).mul_(weight).sum().clamp(min=1e-30)
            loss = float((error @ moments.square).mul_(error).sum() / energy)
        block.put(target, form, loss)


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced rows."""
    if weight.shape[0] <= _ROWS:
        return weight
    step = weight.shape[0] / _ROWS
    index = (torch.arange(_ROWS, device=weight.device) * step).to(torch.int64)
    return weight[index]


def _magnitude(weight: Tensor, width: int) -> Tensor:
    """Mean over rows of each column's magnitude within its group's range, ``[in]``."""
    rows, columns = weight.shape
    pad = -columns % width
    blocks = torch.nn.functional.pad(weight.abs(), (0, pad)).reshape(rows, -1, width)
    share = blocks / blocks.amax(dim=-1, keepdim=True).clamp(min=1e-8)
    return share.reshape(rows, -1)[:, :columns].mean(0).clamp(min=1e-4)


def _error(weight: Tensor, square: Tensor, config: AwqConfig) -> float:
    """Squared output error of rounding ``weight`` to nearest."""
    rows, columns = weight.shape
    width = group_width(config, columns)
    blocks = weight.reshape(rows, -1, width)
    scale, zero = ranges(blocks, config)
    error = (nearest(blocks, scale, zero) - blocks).reshape(rows, columns)
    return float((error @ square).mul_(error).sum())


def _clip(weight: Tensor, moments: _Moments, config: AwqConfig) -> Tensor:
    """Share of each group's range to keep, ``[out, groups]``, by the error within the group."""
    rows, columns = weight.shape
    width = group_width(config, columns)
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
