"""The method itself: float weights in, a form out, by blocks of rows.

A weight may be larger than the memory there is, so it comes in blocks: take ``row_blocks`` and
keep no block, for it is overwritten by the next. If your method needs the whole matrix, call
``weight.tensor()`` and tell what it costs in ``working_bytes``.
"""

from __future__ import annotations

import torch
from quantmill.backend import Quantizer, WeightSource
from quantmill.finite import FiniteCheck
from quantmill.forms import Codes, Form
from quantmill.targeting.types import Target
from torch import Tensor
from torch.nn import functional

from quantmill_example.codec import empty_form
from quantmill_example.config import ExampleConfig

__all__ = ["ExampleQuantizer"]


class ExampleQuantizer(Quantizer[ExampleConfig]):
    """Rounds each weight to the nearest point of its group's grid."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        # Plans are made of this: it must have the bytes, shapes and traits of the real one.
        shape = (target.out_features, target.in_features)
        return empty_form(self.config, shape, dtype, "meta")

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        # Float copies of the block at hand, which has 4 MiB at most as it is read.
        return 12 * min(target.weights, (4 << 20) // dtype.itemsize)

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        bits, columns = self.config.bits, weight.shape[1]
        shape = (target.out_features, target.in_features)
        form = empty_form(self.config, shape, weight.dtype, self.device)
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        codes = form.codes.data.reshape(-1)
        # Two rows of odd width share a byte: such blocks have to end with an even row.
        multiple = 2 if bits == 4 and columns % 2 else 1
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks(multiple):
                # quantmill names the element and stops, or keeps the module float if asked to.
                finite.look(block, start * columns)
                stop = start + block.shape[0]
                rounded, scale, zero = self._round(block.to(torch.float32))
                form.scale[start:stop], form.offset[start:stop] = scale, zero
                packed = Codes.pack(rounded, bits, form.codes.packing).data.reshape(-1)
                first = start * columns * bits // 8
                codes[first : first + packed.numel()] = packed
        return form

    def _round(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[rows, in]``, scales and zero points ``[rows, groups]`` of a float32 block.

        Replace this by your method. Each result may depend on its own row only: the same weight
        in other blocks has to give the same bits.
        """
        size, top = self.config.group_size, 2**self.config.bits - 1
        rows, columns = block.shape
        # Zeros fill up a shorter last group. They change nothing: every grid has a zero.
        groups = functional.pad(block, (0, -columns % size)).reshape(rows, -1, size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if self.config.symmetric:
            middle = (top + 1) // 2
            scale = torch.maximum(-low, high) / (middle - 1)
        else:
            scale = high / top - low / top
        scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
        zero = torch.full_like(low, middle) if self.config.symmetric else (-low / scale).round()
        codes = (groups / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, top)
        return codes.reshape(rows, -1)[:, :columns], scale, zero
