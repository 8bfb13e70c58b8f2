"""bitsandbytes' disk layouts as codecs over the core's forms.

4-bit, relative to the module::

    weight                 uint8 [ceil(n / 2), 1]  two codes a byte, the first in the high nibble
                           (or the same bytes viewed as quant_storage)
    weight.absmax          float32 [blocks]        or uint8 [blocks] with double quantization
    weight.quant_map       float32 [16]            the table
    weight.nested_absmax   float32 [ceil(blocks / 256)]      double quantization only
    weight.nested_quant_map float32 [256]                    double quantization only
    weight.quant_state.bitsandbytes__nf4 (or fp4)  uint8: JSON text with block size, dtype, shape

int8::

    weight          int8 [out, in]
    SCB             float32 [out]     the row's absmax
    weight_format   uint8 []          0, row-major
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form
from quantmill.targeting.types import Target
from quantmill_bnb.config import BnbConfig

__all__ = ["BnbCodec", "FourBitCodec", "Int8Codec"]

BAD_STATE = declare("QM-BNB-001", "A quantized weight's tensors contradict each other")
NESTED_BLOCK = 256
"""Scales per nested scale; fixed by the format."""
STATE = "weight.quant_state.bitsandbytes__"


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(BAD_STATE(target.name, cause, "the checkpoint is damaged: get it again"))


class FourBitCodec(Codec[BnbConfig]):
    """NF4 and FP4, with or without double quantization."""

    suffixes: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        STATE + "nf4",
        STATE + "fp4",
    )

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Codebook) and isinstance(form.grouping, Flat)
        storage = getattr(torch, self.config.bnb_4bit_quant_storage)
        data = form.codes.data.reshape(-1)
        width = storage.itemsize
        if data.numel() % width:
            pad = data.new_zeros(width - data.numel() % width)
            data = torch.cat([data, pad])
        state: dict[str, Any] = {
            "quant_type": form.table_name,
            "blocksize": form.grouping.size,
            "dtype": str(form.dtype).removeprefix("torch."),
            "shape": list(form.shape),
        }
        out = {"weight": data.view(storage).reshape(-1, 1)}
        scale = form.scale
        if isinstance(scale, Codebook):
            assert scale.offset is not None and isinstance(scale.scale, Tensor)
            out["weight.absmax"] = scale.codes.data.reshape(-1)
            out["weight.nested_absmax"] = scale.scale
            out["weight.nested_quant_map"] = scale.table.clone()
            state["nested_blocksize"] = NESTED_BLOCK
            state["nested_dtype"] = "float32"
            # On the meta device there is no value yet; this one has the usual length as text.
            state["nested_offset"] = (
                0.012345678901234567 if scale.offset.is_meta else scale.offset.item()
            )
        else:
            assert isinstance(scale, Tensor)
            out["weight.absmax"] = scale
        out["weight.quant_map"] = form.table.clone()
        blob = json.dumps(state).encode("utf-8")
        out[STATE + form.table_name] = torch.tensor(list(blob), dtype=torch.uint8)
        return out

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        kind = self._kind(tensors)
        if kind is None:
            raise _refuse(target, "it has no quant_state tensor")
        try:
            state = json.loads(bytes(tensors[STATE + kind].tolist()).decode("utf-8"))
            shape = tuple(int(size) for size in state["shape"])
            block = int(state["blocksize"])
            stored = getattr(torch, state["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise _refuse(target, f"its quant_state is unreadable: {error}") from None
        count = prod(shape)
        data = tensors["weight"].reshape(-1).view(torch.uint8)
        if data.numel() < (count + 1) // 2:
            raise _refuse(target, f"{data.numel()} bytes can't hold shape {list(shape)}")
        data = data[: (count + 1) // 2]
        if target.kind != "stacked" and set(shape) != {target.out_features, target.in_features}:
            raise _refuse(
                target,
                f"its quant_state says {list(shape)}, the model wants"
                f" {[target.out_features, target.in_features]}",
            )
        absmax = tensors.get("weight.absmax")
        table = tensors.get("weight.quant_map")
        blocks = -(-count // block)
        if absmax is None or absmax.numel() != blocks:
            raise _refuse(target, f"absmax does not have {blocks} entries")
        if table is None or table.numel() != 16:
            raise _refuse(target, "quant_map does not have 16 entries")
        scale: Tensor | Form = absmax.reshape(-1)
        if "weight.nested_absmax" in tensors:
            nested = tensors["weight.nested_absmax"].reshape(-1)
            if nested.numel() != -(-blocks // int(state.get("nested_blocksize", NESTED_BLOCK))):
                raise _refuse(target, "nested_absmax has the wrong number of entries")
            scale = Codebook(
                Codes(absmax.reshape(-1), 8, (blocks,), "u8"),
                tensors["weight.nested_quant_map"].reshape(-1),
                nested,
                Flat(int(state.get("nested_blocksize", NESTED_BLOCK))),
                offset=torch.tensor(float(state["nested_offset"]), device=absmax.device),
                table_name="dynamic8",
            )
        return Codebook(
            Codes(data.reshape(-1, 1), 4, shape, "hi4"),
            table.reshape(-1),
            scale,
            Flat(block),
            table_name=kind,
            dtype=stored,
        )

    @staticmethod
    def _kind(names: Mapping[str, Any]) -> str | None:
        return next((kind for kind in ("nf4", "fp4") if STATE + kind in names), None)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        kind = self._kind(headers)
        if kind is None or "weight.absmax" not in headers:
            return None
        blocks = prod(headers["weight.absmax"].shape)
        shape = (target.out_features, target.in_features)
        block = self._block(prod(shape), blocks)
        return abstract_four_bit(shape, kind, block, "weight.nested_absmax" in headers, dtype)

    @staticmethod
    def _block(count: int, blocks: int) -> int:
        for size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            if -(-count // size) == blocks:
                return size
        return 64


def abstract_four_bit(
    shape: tuple[int, ...], kind: str, block: int, nested: bool, dtype: torch.dtype
) -> Codebook:
    """A 4-bit form on the meta device."""
    blocks = -(-prod(shape) // block)
    meta = torch.device("meta")
    scale: Tensor | Form = torch.empty(blocks, device=meta)
    if nested:
        scale = Codebook(
            Codes.empty((blocks,), 8, "u8", meta),
            torch.empty(256, device=meta),
            torch.empty(-(-blocks // NESTED_BLOCK), device=meta),
            Flat(NESTED_BLOCK),
            offset=torch.empty((), device=meta),
            table_name="dynamic8",
        )
    return Codebook(
        Codes.empty(shape, 4, "hi4", meta),
        torch.empty(16, device=meta),
        scale,
        Flat(block),
        table_name=kind,
        dtype=dtype,
    )


class Int8Codec(Codec[BnbConfig]):
    """LLM.int8: codes and the absmax of each row."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight", "SCB", "weight_format")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine) and isinstance(form.scale, Tensor)
        return {
            "weight": form.codes.data,
            "SCB": form.scale,
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        if "SCB" not in tensors:
            raise _refuse(target, "it has no SCB (row scales)")
        weight, scale = tensors["weight"], tensors["SCB"]
        if weight.dtype != torch.int8 or weight.ndim != 2:
            raise _refuse(target, f"weight is {weight.dtype} {list(weight.shape)}, not int8 rows")
        wanted = (target.out_features, target.in_features)
        if set(weight.shape) != set(wanted) or scale.numel() != weight.shape[0]:
            raise _refuse(
                target,
                f"weight {list(weight.shape)} and SCB {list(scale.shape)} do not fit"
                f" a model that wants {list(wanted)}",
            )
        if int(tensors.get("weight_format", torch.zeros(())).item()) != 0:
            raise _refuse(target, "weight_format is not row-major (0)")
        return Affine(
            Codes(weight, 8, tuple(weight.shape), "i8"),
            scale,
            Channel(0),
            factor=1.0 / 127.0,
            dtype=dtype,
        )

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if "SCB" not in headers or headers["weight"].dtype != "I8":
            return None
        return abstract_int8((target.out_features, target.in_features), dtype)


def abstract_int8(shape: tuple[int, ...], dtype: torch.dtype) -> Affine:
    """An int8 form on the meta device."""
    return Affine(
        Codes.empty(shape, 8, "i8", "meta"),
        torch.empty(shape[0], device="meta"),
        Channel(0),
        factor=1.0 / 127.0,
        dtype=dtype,
    )


class BnbCodec(Codec[BnbConfig]):
    """Both layouts; which one a module is in, its tensors and its form tell."""

    suffixes: ClassVar[tuple[str, ...]] = (
        *FourBitCodec.suffixes,
        *Int8Codec.suffixes[1:],
    )

    def __init__(self, config: BnbConfig) -> None:
        super().__init__(config)
        self.four = FourBitCodec(config)
        self.eight = Int8Codec(config)

    def encode(self, form: Form) -> dict[str, Tensor]:
        return (self.four if isinstance(form, Codebook) else self.eight).encode(form)

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        codec = self.eight if "SCB" in tensors else self.four
        return codec.decode(tensors, target, dtype)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        return self.four.describe(headers, target, dtype) or self.eight.describe(
            headers, target, dtype
        )
