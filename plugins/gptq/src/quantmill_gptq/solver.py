"""Rounding with error compensation.

A weight ``W [out, in]`` is rounded column by column; the error of a column is spread over the
columns not yet rounded, so that the output on the calibration inputs changes least. Columns are
worked in panels of up to 128. With moments ``H = V @ V.T``, V upper triangular, the output's error
is that of ``V.T @ E``, E being what the rounded weight lacks: a panel's columns start from where
they make up for the rows of ``E`` before them, which takes one matrix product per panel, and no
inverse beyond the panel's own block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantmill.calibration.loss import JUDGED, evenly, relative_error
from quantmill.forms import Affine
from quantmill.kernels import KernelRegistry
from quantmill_gptq.columns import SEVERAL, compensate, panels_of, preferred, product
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.factor import inverse, root_of
from quantmill_gptq.refine import refine, slope_of
from quantmill_gptq.rounding import Grid, fit, grid_of, make_form

__all__ = ["Problem", "gptq"]


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
        self.root, self.damping = root_of(
            moments, config.damp_percent, config.damp_auto_increment, name
        )
        """Upper triangular, float32 ``[in, in]``, see :func:`root_of`."""
        self.panels = panels_of(self.owner.tolist(), not config.static_groups)
        self.local = [inverse(self.root[p.start : p.stop, p.start : p.stop]) for p in self.panels]
        """The factor of the inverse moments within each panel."""

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
    weight: Tensor,
    problem: Problem,
    config: GptqConfig,
    kernels: KernelRegistry,
    cross: Tensor | None = None,
) -> tuple[Affine, float]:
    """The form of ``weight [out, in]`` and the relative squared error of its output. ``cross
    [in, in]`` are moments of the inputs with what the float model's inputs add to them."""
    width, owner = problem.width, problem.owner
    static = None
    if config.static_groups:
        live = weight.to(torch.float32).masked_fill(problem.dead, 0.0)
        static = grid_of(live, width, config)
    # Columns are rows here: what a step touches lies together.
    turned = weight.t().contiguous()
    dead = problem.dead
    if problem.order is not None:
        turned, dead = turned[problem.order], dead[problem.order]
    turned = turned.to(torch.float32, copy=True)
    turned[dead] = 0.0
    if cross is not None and config.gptaq_alpha:
        turned.add_(_made_up(turned, cross, problem), alpha=config.gptaq_alpha)
    exact = turned.clone() if config.passes > 1 else None
    codes, scales, zeros = _sweep(turned, problem, static, config, kernels)
    if config.passes:
        steps = codes.to(torch.float32).sub_(zeros[owner])
        slope = slope_of(turned, problem.root)
        for number in range(config.passes):
            if number:
                assert exact is not None
                slope = _slope(exact, steps, scales, problem, kernels)
            refine(
                steps,
                scales,
                zeros,
                slope,
                problem.hessian,
                problem.damping,
                problem.panels,
                config.maximum,
                kernels,
            )
        codes = steps.add_(zeros[owner]).to(torch.uint8)
    index = evenly(weight.shape[0], weight.device, JUDGED)
    values = codes[:, index].to(torch.float32).sub_(zeros[:, index][owner])
    values.mul_(scales[:, index][owner])
    if problem.back is not None:
        codes, values = codes[problem.back], values[problem.back]
    loss = relative_error(weight[index], values.t(), problem.square)
    grid = Grid(scales.t().contiguous(), zeros.t().contiguous())
    order = None if problem.index is None else problem.index.to(torch.int32)
    return make_form(codes.t().contiguous(), grid, width, config, weight.dtype, order), loss


def _made_up(turned: Tensor, cross: Tensor, problem: Problem) -> Tensor:
    """What, added to a weight ``[in, out]`` in the problem's order, fits its outputs on the inputs
    at hand to those on the float model's.

    With H the moments of the inputs x and C those of x with what the float model adds to them, the
    outputs' error ``|W' x - W (x + d)|`` is least for ``W' = W + W C.T inv(H)``: compensating the
    rounding of W' minimises what GPTAQ does.
    """
    if problem.order is not None:
        cross = cross[problem.order][:, problem.order]
    wanted = torch.linalg.solve_triangular(problem.root, cross @ turned, upper=True)
    return torch.linalg.solve_triangular(problem.root.t(), wanted, upper=False)


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
    turned: Tensor,
    problem: Problem,
    static: Grid | None,
    config: GptqConfig,
    kernels: KernelRegistry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round all columns in order: codes uint8 ``[in, out]``, scales and zero points ``[groups,
    out]``. ``turned``, the weight ``[in, out]``, becomes each column's error over its diagonal
    entry of the factor."""
    columns, rows = turned.shape
    groups = -(-columns // problem.width)
    if static is None:
        scales = torch.ones(groups, rows, device=turned.device)
        zeros = torch.zeros(groups, rows, device=turned.device)
    else:
        scales, zeros = static.scale.t().contiguous(), static.zero.t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=turned.device)
    lacking = torch.empty_like(turned)
    product_of = preferred("product", product, kernels, turned.device, "tensor")
    owed = _Owed(problem.root, lacking, product_of)
    top, symmetric, exponent = config.grid
    rounded = preferred("compensate", compensate, kernels, turned.device)
    for panel, local in zip(problem.panels, problem.local, strict=True):
        start, stop = panel.start, panel.stop
        if panel.wide is not None and panel.wide[0] == start:
            number, end = panel.groups[0], panel.wide[1]
            values = turned[start:end]
            if start:
                factor = inverse(problem.root[start:end, start:end])
                values = values.addmm(factor.t(), owed.before(start, end))
            scales[number], zeros[number] = fit(values.t(), top, symmetric, exponent)
        part = turned[start:stop]
        lacking[start:stop] = part
        if start:
            part.addmm_(local.t(), owed.before(start, stop))
        rounded(
            part,
            local,
            panel.groups,
            panel.begins,
            scales,
            zeros,
            codes[start:stop],
            top=top,
            symmetric=symmetric,
            exponent=exponent,
        )
        owner = problem.owner[start:stop]
        steps = codes[start:stop].to(torch.float32).sub_(zeros[owner])
        lacking[start:stop].addcmul_(steps, scales[owner], value=-1.0)
    return codes, scales, zeros


class _Owed:
    """What columns before a panel leave for it to make up for, ``V.T @ E``: most of it for several
    panels at once, for a product of few rows takes longer than its share."""

    def __init__(
        self, root: Tensor, lacking: Tensor, product_of: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._root, self._lacking, self._product_of = root, lacking, product_of
        self._start = self._stop = 0
        self._far = lacking[:0]

    def before(self, start: int, stop: int) -> Tensor:
        """For columns ``[start, stop)``, all before ``start`` being rounded: float32 ``[stop -
        start, out]``."""
        if start >= self._stop:
            self._start, self._stop = start, min(start + SEVERAL, self._root.shape[0])
            self._far = self._product(0, start, self._stop)
        if stop > self._stop:
            return self._product(0, start, stop)
        far = self._far[start - self._start : stop - self._start]
        return far if start == self._start else far + self._product(self._start, start, stop)

    def _product(self, first: int, start: int, stop: int) -> Tensor:
        return self._product_of(self._root[first:start, start:stop], self._lacking[first:start])


def _slope(
    exact: Tensor, steps: Tensor, scales: Tensor, problem: Problem, kernels: KernelRegistry
) -> Tensor:
    """Damped moments times what the rounded weight lacks, ``[in, out]``."""
    missing = exact - steps * scales[problem.owner]
    product_of = preferred("product", product, kernels, missing.device, "tensor")
    slope = product_of(problem.hessian, missing)  # Moments are their own transpose.
    extra = float(problem.damping * problem.hessian.diagonal().mean())
    return slope.add_(missing, alpha=extra)
