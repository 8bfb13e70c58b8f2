"""Quantizes weights to ggml's types, with the bytes of its quantizers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantmill.backend import NonFiniteWeight, Quantizer, WeightSource
from quantmill.findings import Finding
from quantmill.finite import first_non_finite
from quantmill.forms import Form
from quantmill.targeting.types import Target
from quantmill_gguf import codes
from quantmill_gguf.config import GgufConfig
from quantmill_gguf.encode import NotFinite, encode, kernel_for
from quantmill_gguf.types import RawForm
from quantmill_gguf.types.base import piece_bytes
from quantmill_gguf.types.sizes import BY_NAME

__all__ = ["GgufQuantizer"]


class GgufQuantizer(Quantizer[GgufConfig]):
    """Rounds to nearest, block by block."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        info = BY_NAME[self.config.type_for(target.in_features)]
        # Blocks are whole: where they are not, check() has refused the target.
        columns = -(-target.in_features // info.block) * info.block
        raw = torch.empty(
            target.out_features, info.row_bytes(columns), dtype=torch.uint8, device="meta"
        )
        return RawForm(raw, info.name, dtype)

    def check(self, target: Target) -> Iterator[Finding]:
        info = BY_NAME[self.config.type_for(target.in_features)]
        if target.in_features % info.block:
            yield codes.NO_BLOCKS(
                target.name,
                f"its width {target.in_features} is no multiple of {info.block}, a block of"
                f" {info.name}",
                f"keep it float: --skip {target.name}",
            )

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        name = self.config.type_for(target.in_features)
        if kernel_for(name, self.kernels, self.device.type, dtype) is not None:
            return 0
        # Of a row block: its bytes, and what becomes of a piece of it in the widest types.
        block = self.block_weights(target, dtype)
        return piece_bytes(block) + BY_NAME[name].row_bytes(block)

    def quantize(
        self, target: Target, weight: WeightSource, importance: Tensor | None = None
    ) -> Form:
        """Blocks of the target's type; ``importance`` is float32 ``[columns]``, see
        :func:`~quantmill_gguf.encode.encode`."""
        info = BY_NAME[self.config.type_for(target.in_features)]
        columns = target.in_features
        raw = torch.empty(
            target.out_features, info.row_bytes(columns), dtype=torch.uint8, device=self.device
        )
        for start, block in weight.row_blocks():
            rows = raw[start : start + block.shape[0]]
            try:
                encode(
                    info.name, block, importance, name=weight.name, kernels=self.kernels, out=rows
                )
            except NotFinite:
                at = start * columns + int(first_non_finite(block))
                raise NonFiniteWeight(weight.name, at) from None
        return RawForm(raw, info.name, weight.dtype)
