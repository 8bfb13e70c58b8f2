"""GPTQ (arXiv 2210.17323) over the blocks of a model.

A weight ``W [out, in]`` is rounded column by column; the error of a column is spread over the
columns not yet rounded, so that the output on the calibration inputs changes least. Columns are
worked in panels of 128 with lazy updates of the rest: within a panel vectors, between panels one
matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.backend import BlockCalibrator
from quantmill.calibration.block import Block
from quantmill.forms import Affine
from quantmill.targeting.types import Target
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.hessian import Hessian, inverse_factor
from quantmill_gptq.quantizer import group_width
from quantmill_gptq.rounding import Grid, fit, grid_of, make_form, rounded

__all__ = ["GptqCalibrator", "gptq"]

_PANEL = 128


class GptqCalibrator(BlockCalibrator[GptqConfig]):
    """One Hessian for all linears that share an input."""

    def calibrate(self, block: Block) -> None:
        order = block.call_order()
        hessians = [Hessian(group[0].in_features, self.device) for group in order]
        observers = [
            (group[0].name, hessian.add) for group, hessian in zip(order, hessians, strict=True)
        ]

        def quantize(number: int) -> None:
            for target in order[number]:
                self._target(block, target, hessians[number])
            hessians[number].free()

        if self.config.true_sequential:
            block.quantize_in_order(observers, quantize)
            return
        block.observe(dict(observers))
        for number in range(len(order)):
            quantize(number)

    def _target(self, block: Block, target: Target, hessian: Hessian) -> None:
        config = block.configs[target.name]
        assert isinstance(config, GptqConfig)
        stored = block.weight(target)
        weight = stored.to(torch.float32)
        if hessian.tokens == 0:
            # No token reached it (an expert that was never routed to): nothing to learn from.
            width = group_width(config, target.in_features)
            form = rounded(weight, grid_of(weight, width, config), width, config, stored.dtype)
            block.put(target, form)
            return
        form, loss = gptq(weight, hessian.mean(), config, target.weight_name, stored.dtype)
        block.put(target, form, loss)


def gptq(
    weight: Tensor, hessian: Tensor, config: GptqConfig, name: str, dtype: torch.dtype
) -> tuple[Affine, float]:
    """The form of ``weight`` and the relative squared error of its output.

    Args:
        weight: float32 ``[out, in]``; changed.
        hessian: float32 ``[in, in]``, mean of ``x x.T`` over the calibration tokens; kept.
        config: bits, groups, order, damping.
        name: of the weight, for messages.
        dtype: of the tensor the form stands for.
    """
    columns = weight.shape[1]
    width = group_width(config, columns)
    work = weight.clone()
    moments = hessian.clone()
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1.0
    work[:, dead] = 0.0
    order = _order(moments, width, config)
    group = torch.arange(columns, device=weight.device) // width
    static = grid_of(work, width, config) if config.static_groups else None
    if order is not None:
        work = work[:, order]
        moments = moments[order][:, order]
    # With act-order alone scales follow the order of columns; otherwise columns keep their group.
    fixed = order is None or not config.desc_act or config.static_groups
    owner = (group[order] if order is not None else group) if fixed else group
    factor, _ = inverse_factor(moments, config.damp_percent, config.damp_auto_increment, name)
    codes, grid = _sweep(work, factor, owner, static, width, config)
    index = None
    if order is not None:
        back = torch.argsort(order)
        codes = codes[:, back]
        if config.desc_act:
            index = (group if fixed else owner[back]).to(torch.int32)
    form = make_form(codes, grid, width, config, dtype, index)
    error = form.dequantize(torch.float32) - weight
    energy = (weight @ hessian).mul_(weight).sum().clamp(min=1e-30)
    loss = float((error @ hessian).mul_(error).sum() / energy)
    return form, loss


def _order(moments: Tensor, width: int, config: GptqConfig) -> Tensor | None:
    """The order in which columns are rounded, int64 ``[in]``, or None for theirs."""
    energy = moments.diagonal()
    columns = energy.numel()
    if config.desc_act:
        return torch.argsort(energy, descending=True, stable=True)
    if not config.act_group_aware or columns <= width or columns % width:
        return None
    # Columns within their groups, then whole groups by their strongest column's share: scales
    # stay where they are, so nothing has to be gathered when the linear computes.
    table = energy.reshape(-1, width)
    within = torch.argsort(table, dim=1, descending=True, stable=True)
    groups = torch.argsort(table.sum(dim=1), descending=True, stable=True)
    start = (torch.arange(table.shape[0], device=energy.device) * width).unsqueeze(1)
    return (within + start)[groups].reshape(-1)


def _sweep(
    work: Tensor,
    factor: Tensor,
    owner: Tensor,
    static: Grid | None,
    width: int,
    config: GptqConfig,
) -> tuple[Tensor, Grid]:
    """Round all columns in order; ``owner`` is the group of each. Codes uint8 ``[out, in]``."""
    rows, columns = work.shape
    top = float(config.maximum)
    groups = -(-columns // width)
    scales = torch.ones(groups, rows, device=work.device)
    zeros = torch.zeros(groups, rows, device=work.device)
    if static is not None:
        scales, zeros = static.scale.t().contiguous(), static.zero.t().contiguous()
    # Columns are rows here: what a step touches lies together.
    turned = work.t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=work.device)
    owners: list[int] = owner.tolist()
    seen: set[int] = set()
    members: dict[int, list[int]] = {}
    for position, number in enumerate(owners):
        members.setdefault(number, []).append(position)
    for start in range(0, columns, _PANEL):
        stop = min(columns, start + _PANEL)
        panel = turned[start:stop].clone()
        errors = torch.empty_like(panel)
        local = factor[start:stop, start:stop]
        for step in range(stop - start):
            number = owners[start + step]
            if static is None and number not in seen:
                seen.add(number)
                current = _current(turned, panel, errors, factor, members[number], start, step)
                scale, zero = fit(current, config)
                scales[number], zeros[number] = scale, zero
            scale, zero = scales[number], zeros[number]
            column = panel[step]
            code = torch.round(column / scale).add_(zero).clamp_(0, top)
            codes[start + step] = code
            error = (column - (code - zero) * scale) / local[step, step]
            errors[step] = error
            if step + 1 < stop - start:
                panel[step + 1 :].addr_(local[step, step + 1 :], error, alpha=-1.0)
        if stop < columns:
            turned[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    return codes.t().contiguous(), Grid(scales.t().contiguous(), zeros.t().contiguous())


def _current(
    turned: Tensor,
    panel: Tensor,
    errors: Tensor,
    factor: Tensor,
    members: list[int],
    start: int,
    step: int,
) -> Tensor:
    """A group's columns as they are at this step, ``[out, n]``, lazy updates applied."""
    size = panel.shape[0]
    inside = [m - start for m in members if start <= m < start + size]
    beyond = [m for m in members if m >= start + size]
    parts = [panel[inside]]
    if beyond:
        later = turned[beyond]
        if step:
            index = torch.tensor(beyond, device=turned.device)
            later = later - factor[start : start + step][:, index].t() @ errors[:step]
        parts.append(later)
    return torch.cat(parts).t()
