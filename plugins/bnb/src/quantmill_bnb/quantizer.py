"""Quantizes to bitsandbytes' formats, with bytes equal to its own, streaming by row blocks."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from quantmill.backend import Quantizer, WeightSource
from quantmill.findings import QuantmillError, declare
from quantmill.finite import FiniteCheck, first_non_finite
from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form
from quantmill.targeting.types import Target
from quantmill_bnb.codec import abstract_four_bit, abstract_int8
from quantmill_bnb.config import BnbConfig
from quantmill_bnb.state import NESTED_BLOCK
from quantmill_bnb.tables import TABLES, dynamic8

__all__ = ["BnbQuantizer"]

TOO_LARGE = declare("QM-BNB-002", "The scales of a weight are too large for double quantization")
_TAKEN = (torch.float32, torch.bfloat16, torch.float16)


def _taken(dtype: torch.dtype) -> torch.dtype:
    """The dtype that bitsandbytes would see: it takes no others, and a state that names one can't
    be computed with."""
    return dtype if dtype in _TAKEN else torch.float32


class BnbQuantizer(Quantizer[BnbConfig]):
    """NF4, FP4 and LLM.int8."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        dtype = _taken(dtype)
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
        weights, block = self.block_weights(target, dtype), self.config.bnb_4bit_blocksize
        if self.config.load_in_8bit:
            # Without a kernel: in float16 and float32, and what is rounded.
            return 0 if self._int8_kernel(_taken(dtype)) is not None else 16 * weights
        # Without one: in float32, over its scales, with indices into the table of 8 bytes.
        work = 0 if self._flat_kernel(_taken(dtype)) is not None else 24 * weights
        if not self.config.bnb_4bit_use_double_quant:
            return work
        # Scales are float32 until the last block is done, then quantized over a copy.
        scales = -(-target.weights // block)
        return max(work + 4 * scales, 8 * scales)

    def _four_bit(self, weight: WeightSource) -> Codebook:
        kind, block = self.config.bnb_4bit_quant_type, self.config.bnb_4bit_blocksize
        rows, columns = weight.shape
        dtype = _taken(weight.dtype)
        codes = Codes.empty((rows, columns), 4, "hi4", self.device)
        absmax = self._scales(-(-rows * columns // block))
        packed = codes.data.reshape(-1)
        kernel = self._flat_kernel(dtype)
        # Blocks of scales cross rows: a piece must end where a block of scales and a byte end.
        step = max(block, 2)
        with FiniteCheck(weight.name) as finite:
            for start, piece in weight.row_blocks(step // gcd(step, columns)):
                first, flat = start * columns, piece.to(dtype).reshape(-1)
                last = first + flat.numel()
                bad = _quantize_flat(
                    kernel,
                    flat,
                    kind,
                    block,
                    packed[first // 2 : (last + 1) // 2],
                    absmax[first // block : -(-last // block)],
                )
                finite.found(bad, first)
        scale: Tensor | Form = absmax
        if self.config.bnb_4bit_use_double_quant:
            scale = self._nest(absmax, weight.name)
        return Codebook(
            codes,
            TABLES[kind]().to(self.device),
            scale,
            Flat(block),
            table_name=kind,
            dtype=dtype,
        )

    def _nest(self, absmax: Tensor, name: str) -> Codebook:
        offset = absmax.mean()
        if not bool(offset.isfinite()):
            raise QuantmillError(
                TOO_LARGE(
                    name,
                    "the sum of its blocks' largest magnitudes exceeds float32",
                    "repair the checkpoint, or leave bnb_4bit_use_double_quant out",
                )
            )
        centred = absmax - offset
        codes = torch.empty(centred.numel(), dtype=torch.uint8, device=self.device)
        scale = self._scales(-(-centred.numel() // NESTED_BLOCK))
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
            codes, scale = _nested_reference(centred, table)
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
        scale = self._scales(rows)
        dtype = _taken(weight.dtype)
        kernel = self._int8_kernel(dtype)
        with FiniteCheck(weight.name) as finite:
            for start, given in weight.row_blocks():
                piece = given.to(dtype).contiguous()
                stop = start + piece.shape[0]
                if kernel is not None:
                    bad = kernel(piece, out_codes=codes[start:stop], out_scale=scale[start:stop])
                else:
                    # The peer rounds weights to float16 before it takes the rows' absmax.
                    half = piece.to(torch.float16)
                    bad = first_non_finite(half)
                    form = Affine.quantize_rows_int8(half)
                    codes[start:stop] = form.codes.data
                    scale[start:stop] = form.scale  # type: ignore[assignment]
                finite.found(bad, start * columns)
        return Affine(
            Codes(codes, 8, (rows, columns), "i8"),
            scale,
            Channel(0),
            factor=1.0 / 127.0,
            dtype=dtype,
        )

    def _scales(self, count: int) -> Tensor:
        # The process's default dtype need not be float32: training scripts change it.
        return torch.empty(count, dtype=torch.float32, device=self.device)

    def _flat_kernel(self, dtype: torch.dtype) -> Any:
        kind, block = self.config.bnb_4bit_quant_type, self.config.bnb_4bit_blocksize
        return self._kernel(
            "codebook", dtype, bits=4, table=kind, grouping="flat", group_size=block
        )

    def _int8_kernel(self, dtype: torch.dtype) -> Any:
        return self._kernel(
            "affine", dtype, bits=8, grouping="channel", offset="none", packing="i8"
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


def _quantize_flat(
    kernel: Any, flat: Tensor, kind: str, block: int, packed: Tensor, absmax: Tensor
) -> int | Tensor:
    if kernel is not None:
        found: int | Tensor = kernel(
            flat, table=kind, block_size=block, out_codes=packed, out_scale=absmax
        )
        return found
    bad = first_non_finite(flat)
    form = Codebook.quantize(flat, TABLES[kind]().to(flat.device), block, bits=4, packing="hi4")
    packed.copy_(form.codes.data.reshape(-1))
    absmax.copy_(form.scale)  # type: ignore[arg-type]
    return bad


def _nested_reference(centred: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of nested scales in plain torch.

    The core's reference, but for blocks whose absmax is zero or too small to have a finite
    reciprocal: times infinity, the peer gives the first code to what is not positive and the last
    one to the rest, and a block of zeros has the first code throughout.
    """
    count = centred.numel()
    blocks = torch.nn.functional.pad(centred, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    tiny = torch.isinf(1.0 / absmax).unsqueeze(1)
    form = Codebook.quantize_dynamic(blocks.masked_fill(tiny, 0.0).reshape(-1), table, NESTED_BLOCK)
    extreme = torch.where(blocks > 0, table.numel() - 1, 0).to(torch.uint8)
    codes = torch.where(tiny, extreme, form.codes.data.reshape(blocks.shape))
    # A view would keep the padding in memory.
    return codes.reshape(-1)[:count].clone(), absmax
