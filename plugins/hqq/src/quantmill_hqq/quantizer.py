"""Quantizes to HQQ: axis 1 streams by row blocks, axis 0 needs the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from quantmill.backend import Quantizer, WeightSource
from quantmill.findings import Finding, declare
from quantmill.finite import FiniteCheck
from quantmill.forms import Affine, Codes, Form
from quantmill.targeting.types import Target
from quantmill_hqq.config import HqqConfig
from quantmill_hqq.forms import Layout, abstract_form, grouping_of
from quantmill_hqq.optimiser import search_bytes, solve
from quantmill_hqq.packing import fits

__all__ = ["HqqQuantizer"]

NO_GROUPS = declare("QM-HQQ-010", "A weight can't be divided into groups")
NO_WORDS = declare("QM-HQQ-011", "A weight's groups do not fill the layout's words")

_STORED = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = 1 << 13
"""Groups of axis 0 worked on at a time: they are gathered first."""


def _layout(config: HqqConfig, target: Target) -> Layout:
    size = config.group_size
    if size is None:
        size = target.in_features if config.axis == 1 else target.out_features
    return Layout(config.nbits, size, config.axis)


def _taken(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scales and zero points: hqq stores them in the one that it computes in."""
    return dtype if dtype in _STORED else torch.float32


class HqqQuantizer(Quantizer[HqqConfig]):
    """Every group's range divided evenly, zero points searched."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        shape = (target.out_features, target.in_features)
        layout = _layout(self.config, target)
        if target.weights % layout.size:
            # It has no such form, and check() says so; a plan counts bytes all the same.
            layout = Layout(layout.bits, target.in_features, 1)
        return abstract_form(layout, shape, _taken(dtype), dtype)

    def check(self, target: Target) -> Iterator[Finding]:
        layout = _layout(self.config, target)
        keep = f"keep it float: --skip {target.name}"
        if target.weights % layout.size:
            yield NO_GROUPS(
                target.name,
                f"its {target.out_features} x {target.in_features} weights are no multiple of"
                f" group_size {layout.size}",
                f"choose another group_size, or {keep}",
            )
            return
        rows, _ = layout.matrix(target.weights)
        # Codes lie in whole bytes here where groups do; the peer demands as much.
        if not fits(rows, layout.bits) or (layout.size % 8 and layout.bits < 8):
            what = "groups" if layout.axis == 1 else "weights in a group"
            yield NO_WORDS(
                target.name,
                f"{rows} {what} of {layout.size} can't be packed with {layout.bits} bits",
                f"choose another group_size, or {keep}",
            )

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        layout = _layout(self.config, target)
        iters = self.config.iters if self.config.optimize else 0
        if layout.axis == 1:
            # Of a row block: it in float32 and its codes; and the search, or their packing.
            weights = self.block_weights(target, dtype)
            packing = Codes.packing_bytes(weights, layout.bits)
            return 5 * weights + max(packing, search_bytes(weights, iters))
        # The weight as it is stored and its codes, and the same of some columns.
        some = min(target.weights, _COLUMNS * layout.size)
        whole = target.weights * (dtype.itemsize + 1)
        packing = Codes.packing_bytes(target.weights, layout.bits)
        return whole + max(packing, 5 * some + search_bytes(some, iters))

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        layout = _layout(self.config, target)
        shape = (target.out_features, target.in_features)
        count = target.weights // layout.size
        dtype = _taken(weight.dtype)
        scale = torch.empty(count, dtype=dtype, device=self.device)
        zero = torch.empty(count, dtype=dtype, device=self.device)
        run = self._rows if layout.axis == 1 else self._whole
        codes = run(weight, layout, shape, scale, zero)
        grouping = grouping_of(layout.size, layout.axis, shape[1])
        groups = grouping.scale_shape(shape)
        return Affine(
            codes,
            scale.reshape(groups),
            grouping,
            zero.reshape(groups),
            "zero",
            dtype=weight.dtype,
        )

    def _solve(self, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        return solve(
            values,
            config.nbits,
            dtype,
            iters=config.iters if config.optimize else 0,
            norm=config.lp_norm,
        )

    def _packed(
        self, values: Tensor, bits: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Packed codes, scales and zero points of groups."""
        found, scales, zeros = self._solve(values, dtype)
        return Codes.pack(found, bits, "dense").data.reshape(-1), scales, zeros

    def _rows(
        self,
        weight: WeightSource,
        layout: Layout,
        shape: tuple[int, int],
        scale: Tensor,
        zero: Tensor,
    ) -> Codes:
        """Codes of consecutive groups; fills ``scale`` and ``zero``."""
        codes = Codes.empty(shape, layout.bits, "dense", self.device)
        size, columns, packed = layout.size, shape[1], codes.data.reshape(-1)
        # A block ends where a group does, and with it a byte of codes.
        with FiniteCheck(weight.name) as finite:
            for row, block in weight.row_blocks(size // gcd(size, columns)):
                start = row * columns
                finite.look(block, start)
                first, last = start // size, (start + block.numel()) // size
                begin = start * layout.bits // 8
                end = begin - (-block.numel() * layout.bits // 8)
                packed[begin:end], scale[first:last], zero[first:last] = self._packed(
                    block.to(torch.float32).reshape(-1, size), layout.bits, scale.dtype
                )
        return codes

    def _whole(
        self,
        weight: WeightSource,
        layout: Layout,
        shape: tuple[int, int],
        scale: Tensor,
        zero: Tensor,
    ) -> Codes:
        """Codes of strided groups; fills ``scale`` and ``zero``."""
        whole = weight.tensor()
        with FiniteCheck(weight.name) as finite:
            finite.look(whole)
        matrix = whole.reshape(layout.matrix(whole.numel()))
        codes = torch.empty(matrix.shape, dtype=torch.uint8, device=self.device)
        for first in range(0, matrix.shape[1], _COLUMNS):
            part = slice(first, first + _COLUMNS)
            found, scale[part], zero[part] = self._solve(
                matrix[:, part].t().to(torch.float32).contiguous(), scale.dtype
            )
            codes[:, part] = found.t()
        return Codes.pack(codes.reshape(shape), layout.bits, "dense")
