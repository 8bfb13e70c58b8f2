"""bitsandbytes' own linears, made safe: what they compute with is theirs, what is saved is exact.

On a CPU with AVX-512 BF16 the library repacks a weight in place at the first forward and rounds
its scales; saving afterwards would write those. Widths that are no multiple of the block size
fail there altogether. The subclasses below keep the exact scales, unpack before anything else
touches the weight, and compute ragged widths by dequantizing.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from quantmill.backend import LinearFactory
from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form
from quantmill.targeting.types import Target
from quantmill_bnb.config import BnbConfig

__all__ = ["BnbLinearFactory", "QuantmillLinear4bit", "QuantmillLinear8bit"]

# Said once per layer and forward, of something that is how LLM.int8 works.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast from" not in record.getMessage()
)

_PACK_ROWS = 32
"""Rows that the library's CPU kernel takes at a time."""


def _state_of(form: Codebook) -> QuantState:
    assert isinstance(form.grouping, Flat)
    nested = form.scale if isinstance(form.scale, Codebook) else None
    state2 = None
    if nested is not None:
        assert isinstance(nested.grouping, Flat)
        state2 = QuantState(
            absmax=nested.scale,
            blocksize=nested.grouping.size,
            code=nested.table,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=form.scale if nested is None else nested.codes.data,
        shape=torch.Size(form.shape),
        code=form.table,
        blocksize=form.grouping.size,
        quant_type=form.table_name,
        dtype=form.dtype,
        offset=None if nested is None else nested.offset,
        state2=state2,
    )


def _form_of(data: Tensor, state: QuantState) -> Codebook:
    shape = tuple(state.shape)
    scale: Tensor | Form = state.absmax
    if state.nested:
        scale = Codebook(
            Codes(state.absmax, 8, tuple(state.absmax.shape), "u8"),
            state.state2.code,
            state.state2.absmax,
            Flat(state.state2.blocksize),
            offset=state.offset,
            table_name="dynamic8",
        )
    codes = data.reshape(-1).view(torch.uint8)[: (shape[0] * shape[1] + 1) // 2].reshape(-1, 1)
    return Codebook(
        Codes(codes, 4, shape, "hi4"),
        state.code,
        scale,
        Flat(state.blocksize),
        table_name=state.quant_type,
        dtype=state.dtype,
    )


class _Dequantized(torch.autograd.Function):
    """``x @ W.T`` that keeps the form and not the float weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form) -> Tensor:
        ctx.form = form
        return nn.functional.linear(x, form.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.form.dequantize(grad.dtype), None


class QuantmillLinear4bit(bnb.nn.Linear4bit):
    """``Linear4bit`` over a form that is already quantized."""

    def __init__(self, form: Codebook, bias: Tensor | None, config: BnbConfig, codec: Any) -> None:
        rows, columns = form.shape
        compute = getattr(torch, config.bnb_4bit_compute_dtype)
        storage = getattr(torch, config.bnb_4bit_quant_storage)
        nested = isinstance(form.scale, Form)
        super().__init__(
            columns,
            rows,
            bias is not None,
            compute,
            nested,
            form.table_name,
            storage,
            device="meta",
        )
        self._codec = codec
        self._exact: QuantState | None = None
        state = _state_of(form)
        data = codec.encode(form)["weight"]
        self.weight = bnb.nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=nested,
            quant_type=form.table_name,
            quant_storage=storage,
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = state
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._ragged = columns % state.blocksize != 0
        if rows % _PACK_ROWS or columns % 2:
            self.support_avx512bf16_for_cpu = False

    def _is_packed(self) -> bool:
        return bool(getattr(self.weight.quant_state, "packing_format_for_cpu", False))

    def exact_form(self) -> Codebook:
        """The form on disk, whatever the library did to the live copy. Changes nothing."""
        if not self._is_packed():
            return _form_of(self.weight.data, self.weight.quant_state)
        assert self._exact is not None
        return _form_of(_unpack(self.weight.data, self.weight.quant_state), self._exact)

    def unpack(self) -> None:
        """Undo the library's repacking, exactly."""
        if self._is_packed():
            assert self._exact is not None
            data = _unpack(self.weight.data, self.weight.quant_state)
            self.weight.data = data.view(self.quant_storage).reshape(-1, 1)
            self.weight.quant_state = self.quant_state = self._exact
            self._exact = None

    def forward(self, x: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled() and x.requires_grad
        if self.training or gradient:
            self.unpack()
        if x.device.type == "cpu" and self._ragged:
            return self._reference(x)
        if not self._is_packed():
            # The library changes the state it packs in place: let it change a copy.
            exact = self.weight.quant_state
            self.weight.quant_state = copy.copy(exact)
            result: Tensor = super().forward(x)
            # The library may have packed the copy just now.
            self._exact = exact if self._is_packed() else None
            if self._exact is None:
                self.weight.quant_state = exact
            return result
        return super().forward(x)

    def _reference(self, x: Tensor) -> Tensor:
        work = x.to(self.compute_dtype) if self.compute_dtype is not None else x
        form = self.exact_form()
        result: Tensor = _Dequantized.apply(work, form)
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)
        return result.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantmillLinear4bit:
        self.unpack()
        super()._apply(fn, recurse)
        self.quant_state = self.weight.quant_state
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._codec.encode(self.exact_form()).items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


def _unpack(packed: Tensor, state: QuantState) -> Tensor:
    """The disk order of codes from the library's CPU order: uint8 ``[ceil(n / 2)]``.

    Packed, each run of 32 bytes holds, for one pair of columns, the codes of 32 rows: 64 codes,
    the first 32 in the low nibbles, the others in the high ones.
    """
    rows, columns = state.shape
    runs = packed.reshape(-1, _PACK_ROWS)
    codes = torch.cat([runs & 0x0F, runs >> 4], dim=1)
    codes = codes.reshape(rows // _PACK_ROWS, columns // 2, _PACK_ROWS, 2).transpose(1, 2)
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


class QuantmillLinear8bit(bnb.nn.Linear8bitLt):
    """``Linear8bitLt`` over a form that is already quantized."""

    def __init__(self, form: Affine, bias: Tensor | None, config: BnbConfig, codec: Any) -> None:
        rows, columns = form.shape
        super().__init__(
            columns,
            rows,
            bias is not None,
            has_fp16_weights=False,
            threshold=config.llm_int8_threshold,
            device="meta",
        )
        self._codec = codec
        self._dtype = form.dtype
        data = form.codes.data
        self.weight = bnb.nn.Int8Params(
            data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=form.scale
        )
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def exact_form(self) -> Affine:
        """The form, wherever the library keeps it at the moment."""
        codes = self.state.CB if self.state.CB is not None else self.weight.data
        scale = self.state.SCB if self.state.SCB is not None else self.weight.SCB
        return Affine(
            Codes(codes, 8, tuple(codes.shape), "i8"),
            scale,
            Channel(0),
            factor=1.0 / 127.0,
            dtype=self._dtype,
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._codec.encode(self.exact_form()).items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class BnbLinearFactory(LinearFactory[BnbConfig]):
    """Makes the linears above; PEFT and others recognise them as bitsandbytes' own."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        if isinstance(form, Codebook):
            module: nn.Module = QuantmillLinear4bit(form, bias, self.config, self.codec)
        else:
            assert isinstance(form, Affine)
            module = QuantmillLinear8bit(form, bias, self.config, self.codec)
        module.requires_grad_(False)
        return module

    def form_of(self, module: nn.Module) -> Form | None:
        if isinstance(module, QuantmillLinear4bit | QuantmillLinear8bit):
            return module.exact_form()
        return None
