"""Quantizes to bitsandbytes' formats, with bytes equal to its own, streaming by row blocks."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import NonFiniteWeight, Quantizer, WeightSource
from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form
from quantmill.targeting.types import Target
from quantmill_bnb.codec import NESTED_BLOCK, abstract_four_bit, abstract_int8
from quantmill_bnb.config import BnbConfig
from quantmill_bnb.tables import TABLES, dynamic8

__all__ = ["BnbQuantizer"]


class BnbQuantizer(Quantizer[BnbConfig]):
    """NF4, FP4 and LLM.int8."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        shape = (target.out_features, target.in_features)
        if self.config.load_in_8bit:
            return abstract_int8(shape, dtype)
        return abstract_four_bit(
            shape,
            self.config.bnb_4bit_quant_type,
            self.config.bnb_4bit_blocksize,
            self.config.bnb_4bit_use_double_quant,
            dtype,
        )

    def quantize(self, target: Target, weight: WeightSource) -> Form:
        if self.config.load_in_8bit:
            return self._int8(weight)
        return self._four_bit(weight)

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        if self.config.load_in_8bit or not self.config.bnb_4bit_use_double_quant:
            return 0
        # Scales are float32 until the last block is done, then quantized over temporaries.
        return 16 * -(-target.weights // self.config.bnb_4bit_blocksize)

    def _four_bit(self, weight: WeightSource) -> Codebook:
        kind, block = self.config.bnb_4bit_quant_type, self.config.bnb_4bit_blocksize
        rows, columns = weight.shape
        codes = Codes.empty((rows, columns), 4, "hi4", self.device)
        absmax = torch.empty(-(-rows * columns // block), device=self.device)
        packed = codes.data.reshape(-1)
        kernel = self._kernel(
            "codebook", weight.dtype, bits=4, table=kind, grouping="flat", group_size=block
        )
        # Blocks of scales cross rows: a piece must end where a block of scales and a byte end.
        step = max(block, 2)
        for start, piece in weight.row_blocks(step // gcd(step, columns)):
            first, flat = start * columns, piece.reshape(-1)
            last = first + flat.numel()
            bad = _quantize_flat(
                kernel,
                flat,
                kind,
                block,
                packed[first // 2 : (last + 1) // 2],
                absmax[first // block : -(-last // block)],
            )
            if bad >= 0:
                raise NonFiniteWeight(weight.name, first + bad)
        scale: Tensor | Form = absmax
        if self.config.bnb_4bit_use_double_quant:
            scale = self._nest(absmax)
        return Codebook(
            codes,
            TABLES[kind]().to(self.device),
            scale,
            Flat(block),
            table_name=kind,
            dtype=weight.dtype,
        )

    def _nest(self, absmax: Tensor) -> Codebook:
        offset = absmax.mean()
        centred = absmax - offset
        codes = torch.empty(centred.numel(), dtype=torch.uint8, device=self.device)
        scale = torch.empty(-(-centred.numel() // NESTED_BLOCK), device=self.device)
        table = dynamic8().to(self.device)
        kernel = self._kernel(
            "codebook",
            torch.float32,
            bits=8,
            table="dynamic8",
            grouping="flat",
            group_size=NESTED_BLOCK,
        )
        if kernel is None:
            form = Codebook.quantize_dynamic(centred, table, NESTED_BLOCK)
            codes, scale = form.codes.data, form.scale  # type: ignore[assignment]
        else:
            kernel(
                centred, table="dynamic8", block_size=NESTED_BLOCK, out_codes=codes, out_scale=scale
            )
        return Codebook(
            Codes(codes, 8, (codes.numel(),), "u8"),
            table,
            scale,
            Flat(NESTED_BLOCK),
            offset=offset,
            table_name="dynamic8",
        )

    def _int8(self, weight: WeightSource) -> Affine:
        rows, columns = weight.shape
        codes = torch.empty((rows, columns), dtype=torch.int8, device=self.device)
        scale = torch.empty(rows, device=self.device)
        kernel = self._kernel(
            "affine", weight.dtype, bits=8, grouping="channel", offset="none", packing="i8"
        )
        for start, piece in weight.row_blocks():
            stop = start + piece.shape[0]
            if kernel is not None:
                bad = int(kernel(piece, out_codes=codes[start:stop], out_scale=scale[start:stop]))
            else:
                bad = first_non_finite(piece)
                # The peer rounds weights to float16 before it takes the rows' absmax.
                form = Affine.quantize_rows_int8(piece.to(torch.float16))
                codes[start:stop] = form.codes.data
                scale[start:stop] = form.scale  # type: ignore[assignment]
            if bad >= 0:
                raise NonFiniteWeight(weight.name, start * columns + bad)
        return Affine(
            Codes(codes, 8, (rows, columns), "i8"),
            scale,
            Channel(0),
            factor=1.0 / 127.0,
            dtype=weight.dtype,
        )

    def _kernel(self, form: str, dtype: torch.dtype, **traits: Any) -> Any:
        choice = self.kernels.choose(
            "quantize",
            form,
            traits,
            device=self.device.type,
            dtype=str(dtype).removeprefix("torch."),
        )
        return None if choice is None else choice.load()


def first_non_finite(tensor: Tensor) -> int:
    """Flat index of the first NaN or infinity, or -1."""
    finite = torch.isfinite(tensor.reshape(-1))
    if bool(finite.all()):
        return -1
    return int(torch.argmin(finite.to(torch.uint8)).item())


def _quantize_flat(
    kernel: Any, flat: Tensor, kind: str, block: int, packed: Tensor, absmax: Tensor
) -> int:
    if kernel is not None:
        return int(kernel(flat, table=kind, block_size=block, out_codes=packed, out_scale=absmax))
    bad = first_non_finite(flat)
    form = Codebook.quantize(flat, TABLES[kind]().to(flat.device), block, bits=4, packing="hi4")
    packed.copy_(form.codes.data.reshape(-1))
    absmax.copy_(form.scale)  # type: ignore[arg-type]
    return bad
