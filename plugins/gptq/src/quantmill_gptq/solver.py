"""Rounding with error compensation.

A weight ``W [out, in]`` is rounded column by column; the error of a column is spread over the
columns not yet rounded, so that the output on the calibration inputs changes least. Columns are
worked in panels of 128 with lazy updates of the rest: within a panel vectors, between panels one
matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.calibration.loss import relative_loss
from quantmill.forms import Affine
from quantmill.kernels import KernelRegistry
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.factor import inverse_factor
from quantmill_gptq.refine import refined
from quantmill_gptq.rounding import Grid, fit, grid_of, make_form

__all__ = ["Problem", "gptq"]

_PANEL = 128


class Problem:
    """What the weights of one input have in common: the order of columns, and the factor."""

    def __init__(self, square: Tensor, config: GptqConfig, width: int, name: str) -> None:
        """Args:
        square: float32 ``[in, in]``, mean of ``x x.T`` over the calibration tokens; kept.
        config: order and damping.
        width: input columns per group.
        name: of a weight, for messages.
        """
        columns = square.shape[0]
        self.square, self.width = square, width
        self.dead = square.diagonal() == 0
        moments = square
        if bool(self.dead.any()):
            moments = square.clone()
            moments.diagonal()[self.dead] = 1.0
        self.order = _order(moments, width, config)
        if self.order is not None:
            moments = moments[self.order][:, self.order]
        group = torch.arange(columns, device=square.device) // width
        # With act-order alone scales follow the order of columns; otherwise columns keep theirs.
        fixed = self.order is None or not config.desc_act or config.static_groups
        self.owner = group[self.order] if fixed and self.order is not None else group
        self.back = None if self.order is None else torch.argsort(self.order)
        self.index: Tensor | None = None
        """Group of each column, where the form has to say it."""
        if config.desc_act:
            self.index = group if fixed or self.back is None else self.owner[self.back]
        self.hessian = moments
        """Float32 ``[in, in]`` in that order, a one where a column is dead."""
        self.factor, self.damping = inverse_factor(
            moments, config.damp_percent, config.damp_auto_increment, name
        )

    @staticmethod
    def key(config: GptqConfig, width: int) -> tuple[object, ...]:
        """What two weights of one input must have alike to share a problem."""
        return (
            width,
            config.desc_act,
            config.act_group_aware,
            config.static_groups,
            config.damp_percent,
            config.damp_auto_increment,
        )


def gptq(
    weight: Tensor, problem: Problem, config: GptqConfig, kernels: KernelRegistry
) -> tuple[Affine, float]:
    """The form of ``weight [out, in]`` and the relative squared error of its output."""
    width = problem.width
    work = weight.to(torch.float32, copy=True)
    work[:, problem.dead] = 0.0
    static = grid_of(work, width, config) if config.static_groups else None
    if problem.order is not None:
        work = work[:, problem.order]
    codes, grid = _sweep(work, problem.factor, problem.owner, static, width, config)
    if config.refinements:
        codes, grid = refined(
            work, codes, grid, problem.hessian, problem.damping, problem.owner, config
        )
    if problem.back is not None:
        codes = codes[:, problem.back]
    index = None if problem.index is None else problem.index.to(torch.int32)
    form = make_form(codes, grid, width, config, weight.dtype, index)
    return form, relative_loss(weight, form, problem.square)


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
