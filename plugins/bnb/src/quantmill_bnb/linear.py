"""bitsandbytes' own linears, made safe: what they compute with is theirs, what is saved is exact.

On a CPU with AVX-512 BF16 the library repacks a weight in place at the first forward and rounds
its scales; saving afterwards would write those, and whoever dequantizes the weight then (PEFT, to
merge an adapter) gets noise. Widths that are no multiple of the block size fail there altogether,
an input without rows ends the process, and a bias is cast to the compute dtype for good. The
subclasses below keep the exact scales, unpack before anything else looks at the weight, and
compute ragged widths by dequantizing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from quantmill.backend import LinearFactory
from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form
from quantmill.grouped import groups
from quantmill.linear import FormLinear
from quantmill.targeting.types import Target
from quantmill_bnb.config import BnbConfig
from quantmill_bnb.packing import PACK_ROWS, can_pack, pack, unpack

__all__ = ["BnbLinearFactory", "QuantmillLinear4bit", "QuantmillLinear8bit"]

# Said once per layer and forward, of something that is how LLM.int8 works.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast from" not in record.getMessage()
)


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


def _form_of(data: Tensor, state: QuantState, nested_dtype: torch.dtype) -> Codebook:
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
            dtype=nested_dtype,
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
    """``x @ W.T`` that keeps neither its input nor the float weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight(grad.dtype), None


@contextmanager
def _bias_as(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Show the library a bias of the dtype it wants: otherwise it casts the parameter itself."""
    bias = module._parameters["bias"]
    if bias is None or bias.dtype == dtype:
        yield
        return
    # Past register_parameter, which takes no tensor with a history: gradients flow to the bias.
    module._parameters["bias"] = bias.to(dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters["bias"] = bias


def _check_width(module: nn.Linear, x: Tensor) -> None:
    # The library's CPU kernel does not look and computes something.
    if x.shape[-1] != module.in_features:
        raise RuntimeError(
            f"the input has a width of {x.shape[-1]}, the linear wants {module.in_features}"
        )


def _empty_result(module: nn.Linear, x: Tensor) -> Tensor:
    """For an input without rows; still connected to it, for a backward pass."""
    return x.sum(-1, keepdim=True).expand(*x.shape[:-1], module.out_features)


def _computed(module: nn.Module, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """The linear by its definition, in the dtype of ``x``, in which ``weight`` gives its weight."""
    result: Tensor = _Dequantized.apply(x, weight)
    bias = module._parameters["bias"]
    return result if bias is None else result + bias.to(result.dtype)


def _save(module: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    for name, tensor in module._codec.encode(module.exact_form()).items():
        destination[prefix + name] = tensor
    if module.bias is not None:
        destination[prefix + "bias"] = module.bias if keep_vars else module.bias.detach()


class QuantmillLinear4bit(bnb.nn.Linear4bit):
    """``Linear4bit`` over a form that is already quantized."""

    def __init__(self, form: Codebook, bias: Tensor | None, config: BnbConfig, codec: Any) -> None:
        rows, columns = form.shape
        compute = getattr(torch, config.bnb_4bit_compute_dtype)
        storage = getattr(torch, config.bnb_4bit_quant_storage)
        nested = form.scale if isinstance(form.scale, Form) else None
        super().__init__(
            columns,
            rows,
            bias is not None,
            compute,
            nested is not None,
            form.table_name,
            storage,
            device="meta",
        )
        self._codec = codec
        self._exact: QuantState | None = None
        self._nested_dtype = torch.float32 if nested is None else nested.dtype
        state = _state_of(form)
        data = codec.encode(form)["weight"]
        self.weight = bnb.nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=nested is not None,
            quant_type=form.table_name,
            quant_storage=storage,
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = state
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._ragged = columns % state.blocksize != 0
        if rows % PACK_ROWS or columns % 2:
            self.support_avx512bf16_for_cpu = False
        self._computing = False

    def __getattr__(self, name: str) -> Any:
        # Whoever asks for the weight while the library isn't computing with it takes it for what
        # is on disk; only the library's forward can read the packed one.
        if name == "weight" and not self.__dict__.get("_computing", True):
            self.unpack()
        return super().__getattr__(name)

    @property
    def _live(self) -> Any:
        """The weight as it is at the moment."""
        return self._parameters["weight"]

    def _would_be_packed(self, x: Tensor) -> bool:
        """Whether the library would pack the weight in its forward now."""
        able = x.device.type == "cpu" and self.support_avx512bf16_for_cpu and can_pack()
        return bool(able and not self.training and not x.requires_grad)

    def _is_packed(self) -> bool:
        return bool(getattr(self._live.quant_state, "packing_format_for_cpu", False))

    def exact_form(self) -> Codebook:
        """The form on disk, whatever the library did to the live copy. Changes nothing."""
        live = self._live
        if not self._is_packed():
            return _form_of(live.data, live.quant_state, self._nested_dtype)
        assert self._exact is not None
        return _form_of(unpack(live.data, live.quant_state), self._exact, self._nested_dtype)

    def unpack(self) -> None:
        """Undo the library's repacking, exactly."""
        if self._is_packed():
            assert self._exact is not None
            live = self._live
            data = unpack(live.data, live.quant_state)
            live.data = data.view(self.quant_storage).reshape(-1, 1)
            live.quant_state = self.quant_state = self._exact
            self._exact = None

    def forward(self, x: Tensor) -> Tensor:
        _check_width(self, x)
        if x.numel() == 0:
            return _empty_result(self, x)
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            self.unpack()
        if x.device.type == "cpu" and self._ragged:
            work = x.to(self.compute_dtype or x.dtype)
            return _computed(self, work, self.exact_form().dequantize).to(x.dtype)
        exact = None
        if not self._is_packed():
            # The library changes the state it packs in place: let it change a copy.
            exact = self._live.quant_state
            self._live.quant_state = copy.copy(exact)
            if self._would_be_packed(x):
                self._live.data, self._live.quant_state = pack(self._live.data, exact)
        self._computing = True
        try:
            with _bias_as(self, self.compute_dtype or x.dtype):
                result: Tensor = super().forward(x)
        finally:
            self._computing = False
            if exact is not None:
                # Packed just now (also where the forward failed after that), or not.
                if self._is_packed():
                    self._exact = exact
                else:
                    self._live.quant_state = exact
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> QuantmillLinear4bit:
        self.unpack()
        # As bytes: codes that are stored as floats would be converted by .to(dtype).
        self._live.data = self._live.data.view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            self._live.data = self._live.data.view(self.quant_storage)
        self.quant_state = self._live.quant_state
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantmillLinear4bit:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # The library's copy of a weight belongs to the old module and has a state of its own.
        made._live.module = made
        made.quant_state = made._exact if made._exact is not None else made._live.quant_state
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        _save(self, destination, prefix, keep_vars)


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

    def forward(self, x: Tensor) -> Tensor:
        _check_width(self, x)
        if x.numel() == 0:
            return _empty_result(self, x)
        if self.in_features == 1 and x.device.type == "cpu":
            # torch._int_mm, which the library uses, gives wrong sums there (torch 2.13).
            return _computed(self, x, self.exact_form().dequantize)
        if self.training and x.device.type == "cpu":
            # The library would keep the input of every layer, gradient checkpointing or not.
            return _computed(self, x, self._floats)
        # The library takes two or three dimensions.
        with _bias_as(self, x.dtype):
            result: Tensor = super().forward(x.reshape(-1, self.in_features))
        return result.reshape(*x.shape[:-1], self.out_features)

    def _floats(self, dtype: torch.dtype) -> Tensor:
        """The weight that the library trains with on a CPU: rounded once, by its arithmetic."""
        form = self.exact_form()
        assert isinstance(form.scale, Tensor)
        return form.codes.data.to(dtype).mul_(form.scale[:, None] * form.factor)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantmillLinear8bit:
        super()._apply(fn, recurse)
        # Codes and scales are no parameters where the library keeps them, and a parent's .to()
        # does not move them. Only their device changes: they have dtypes of their own.
        for holder in (self.weight, self.state):
            if holder.CB is not None:
                holder.CB = self.weight.data
                holder.SCB = holder.SCB.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        _save(self, destination, prefix, keep_vars)


class BnbLinearFactory(LinearFactory[BnbConfig]):
    """Makes the linears above; PEFT and others recognise them as bitsandbytes' own.

    The library has nothing that multiplies with many weights at once. Experts for which a kernel
    does are the core's linears, and of 8 bits they have float inputs.
    """

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        if target.module.role == "expert" and groups(self.kernels, form, self.device, self.dtype):
            return FormLinear(form, bias, self.codec, self.kernels, self.dtype)
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
        return module.form if isinstance(module, FormLinear) else None

    def forward_bytes(self, form: Form, dtype: torch.dtype) -> int:
        """None where the library's fused kernel computes, else the float weight."""
        rows, columns = form.shape
        fused = isinstance(form, Codebook) and not (rows % PACK_ROWS or columns % 2)
        if fused and self.device == "cpu" and can_pack() and bnb.nn.modules.has_avx512bf16():
            return 0
        return super().forward_bytes(form, dtype)

    def row_bytes(self, form: Form, dtype: torch.dtype) -> int:
        """LLM.int8 rounds the input, and has sums in int32 and then three times in float32."""
        if isinstance(form, Codebook):
            return 0
        rows, columns = form.shape
        return 16 * rows + 3 * columns
