"""Float weights in, trits out, by blocks of rows."""

from __future__ import annotations

import torch
from quantmill.backend import Quantizer, WeightSource
from quantmill.finite import FiniteCheck
from quantmill.forms import Form
from quantmill.targeting.types import Target
from torch import Tensor
from torch.nn import functional

from quantmill_ternary.codec import empty_form
from quantmill_ternary.config import TernaryConfig
from quantmill_ternary.form import pack

__all__ = ["TernaryQuantizer"]


class TernaryQuantizer(Quantizer[TernaryConfig]):
    """Small weights become zero, the others plus or minus the mean magnitude of their like."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        shape = (target.out_features, target.in_features)
        return empty_form(self.config, shape, dtype, "meta")

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        # Float copies of the block at hand, which has 4 MiB at most as it is read.
        return 21 * min(target.weights, (4 << 20) // dtype.itemsize)

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        shape = (target.out_features, target.in_features)
        form = empty_form(self.config, shape, weight.dtype, self.device)
        with FiniteCheck(weight.name) as finite:
            for start, block in weight.row_blocks():
                finite.look(block, start * weight.shape[1])
                stop = start + block.shape[0]
                trits, scale = self._ternary(block.to(torch.float32))
                form.packed[start:stop], form.scale[start:stop] = pack(trits), scale
        return form

    def _ternary(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Trits ``[rows, in]`` and scales ``[rows, groups]`` of a float32 block."""
        size = self.config.group_size
        rows, columns = block.shape
        groups = functional.pad(block, (0, -columns % size)).reshape(rows, -1, size)
        # The last group of a row may be shorter: zeros that fill it up don't count.
        counts = torch.full((groups.shape[1],), float(size), device=block.device)
        counts[-1] = columns - (groups.shape[1] - 1) * size
        size_of = groups.abs()
        mean = size_of.sum(-1) / counts
        large = size_of > self.config.threshold * mean.unsqueeze(-1)
        scale = (size_of * large).sum(-1) / large.sum(-1).clamp(min=1)
        trits = groups.sign() * large
        return trits.reshape(rows, -1)[:, :columns], scale
