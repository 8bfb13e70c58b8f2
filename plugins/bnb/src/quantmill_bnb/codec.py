"""bitsandbytes' disk layouts as codecs over the core's forms.

4-bit, relative to the module::

    weight                 uint8 [ceil(n / 2), 1]  two codes a byte, the first in the high nibble
                           (or the same bytes viewed as quant_storage)
    weight.absmax          float32 [blocks]        or uint8 [blocks] with double quantization
    weight.quant_map       float32 [16]            the table
    weight.nested_absmax   float32 [ceil(blocks / 256)]      double quantization only
    weight.nested_quant_map float32 [256]                    double quantization only
    weight.quant_state.bitsandbytes__nf4 (or fp4)  uint8: JSON text, see state.py

int8::

    weight          int8 [out, in]
    SCB             float32 [out]     the row's absmax
    weight_format   uint8 []          0, row-major
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError
from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form, value_of
from quantmill.forms.convert import kind_words, not_exact
from quantmill.targeting.types import FLOAT_DTYPES, Target
from quantmill_bnb.config import BLOCK_SIZES, STORAGES, BnbConfig
from quantmill_bnb.state import BAD_STATE, NESTED_BLOCK, State, StateError
from quantmill_bnb.tables import TABLES

__all__ = ["BnbCodec", "FourBitCodec", "Int8Codec", "abstract_four_bit", "abstract_int8"]

STATE = "weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
_STORAGES = frozenset(getattr(torch, name) for name in STORAGES)


def _require(fact: bool, target: Target, cause: str) -> None:
    if not fact:
        raise _refusal(target, cause)


def _refusal(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(BAD_STATE(target.name, cause, "the checkpoint is damaged: get it again"))


def _fits(shape: tuple[int, ...], target: Target) -> bool:
    wanted = (target.out_features, target.in_features)
    # What is stored of a Conv1D is its transpose: a linear's weight, as transformers writes it.
    return shape == wanted or (target.kind == "conv1d" and shape == wanted[::-1])


def _missing(needed: Iterable[str], names: Mapping[str, Any], target: Target) -> None:
    missing = [name for name in needed if name not in names]
    _require(not missing, target, f"it has no {' and no '.join(missing)}")


def _floats(tensor: Tensor | None, count: int) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.numel() == count


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
        out = {"weight": data.view(storage).reshape(-1, 1)}
        scale = form.scale
        nested: dict[str, Any] = {}
        if isinstance(scale, Codebook):
            assert scale.offset is not None and isinstance(scale.scale, Tensor)
            out["weight.absmax"] = scale.codes.data.reshape(-1)
            out["weight.nested_absmax"] = scale.scale
            out["weight.nested_quant_map"] = scale.table.clone()
            # On the meta device there is no value yet; this one has the usual length as text.
            offset = 0.012345678901234567 if scale.offset.is_meta else scale.offset.item()
            nested = {"nested_dtype": scale.dtype, "nested_offset": offset}
        else:
            assert isinstance(scale, Tensor)
            out["weight.absmax"] = scale
        out["weight.quant_map"] = form.table.clone()
        state = State(form.table_name, form.grouping.size, form.dtype, form.shape, **nested)
        out[STATE + form.table_name] = state.pack()
        return out

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        kinds = self._kinds(tensors)
        _require(len(kinds) == 1, target, f"it has {len(kinds)} quant_state tensors, not one")
        kind = kinds[0]
        try:
            state = State.unpack(tensors[STATE + kind], kind)
        except StateError as error:
            raise _refusal(target, f"its quant_state is unreadable: {error}") from None
        shape, count = state.shape, prod(state.shape)
        wanted = (target.out_features, target.in_features)
        _require(
            target.kind == "stacked" or _fits(shape, target),
            target,
            f"its quant_state says {list(shape)}, the model wants {list(wanted)}",
        )
        weight, size = tensors.get("weight"), (count + 1) // 2
        _require(
            weight is not None
            and weight.dtype in _STORAGES
            and 0 <= weight.nbytes - size < weight.itemsize,
            target,
            f"weight is not {size} bytes (and what its dtype pads), as shape {list(shape)} needs",
        )
        assert weight is not None
        data = weight.reshape(-1).view(torch.uint8)[:size]
        table = tensors.get("weight.quant_map")
        _require(_floats(table, 16), target, "quant_map does not have 16 float entries")
        assert table is not None
        # The library computes with its own table, whatever the file says: they must agree.
        entries = table.reshape(-1)
        known = TABLES[kind]().to(device=entries.device, dtype=torch.float32)
        _require(
            torch.allclose(entries.to(torch.float32), known, rtol=0.0, atol=1e-3),
            target,
            f"quant_map is not the table of {kind}",
        )
        return Codebook(
            Codes(data.reshape(-1, 1), 4, shape, "hi4"),
            entries,
            self._scale(tensors, state, -(-count // state.block), target),
            Flat(state.block),
            table_name=kind,
            dtype=state.dtype,
        )

    @staticmethod
    def _scale(
        tensors: Mapping[str, Tensor], state: State, blocks: int, target: Target
    ) -> Tensor | Form:
        absmax = tensors.get("weight.absmax")
        nested, table = (tensors.get(f"weight.nested_{name}") for name in ("absmax", "quant_map"))
        given = {nested is not None, table is not None, state.nested_offset is not None}
        _require(len(given) == 1, target, "only a part of its double quantization is there")
        if state.nested_offset is None:
            _require(_floats(absmax, blocks), target, f"absmax does not have {blocks} floats")
            assert absmax is not None
            return absmax.reshape(-1)
        _require(
            absmax is not None and absmax.dtype == torch.uint8 and absmax.numel() == blocks,
            target,
            f"absmax does not have {blocks} codes of 8 bits",
        )
        of = -(-blocks // NESTED_BLOCK)
        _require(_floats(nested, of), target, f"nested_absmax does not have {of} floats")
        _require(_floats(table, 256), target, "nested_quant_map does not have 256 float entries")
        assert absmax is not None and nested is not None and table is not None
        return Codebook(
            Codes(absmax.reshape(-1), 8, (blocks,), "u8"),
            table.reshape(-1),
            nested.reshape(-1),
            Flat(NESTED_BLOCK),
            offset=torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device),
            table_name="dynamic8",
            dtype=state.nested_dtype,
        )

    @staticmethod
    def _kinds(names: Mapping[str, Any]) -> list[str]:
        return [kind for kind in KINDS if STATE + kind in names]

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        own = [name for name in headers if name.startswith("weight.")]
        if not own:
            return None
        kinds = self._kinds(headers)
        _require(len(kinds) == 1, target, f"it has {len(kinds)} quant_state tensors, not one")
        nested = ["weight.nested_absmax", "weight.nested_quant_map"]
        needed = ["weight", "weight.absmax", "weight.quant_map"]
        _missing([*needed, *(nested if set(nested) & set(own) else [])], headers, target)
        blocks = prod(headers["weight.absmax"].shape)
        shape = (target.out_features, target.in_features)
        block = self._block(prod(shape), blocks)
        return abstract_four_bit(shape, kinds[0], block, nested[0] in headers, dtype)

    @staticmethod
    def _block(count: int, blocks: int) -> int:
        # For small weights several sizes give as many blocks: the usual one first.
        for size in (64, *BLOCK_SIZES):
            if -(-count // size) == blocks:
                return size
        return 64


def _planned(*shape: int) -> Tensor:
    # The process's default dtype need not be float32: training scripts change it.
    return torch.empty(shape, dtype=torch.float32, device="meta")


def abstract_four_bit(
    shape: tuple[int, ...], kind: str, block: int, nested: bool, dtype: torch.dtype
) -> Codebook:
    """A 4-bit form on the meta device."""
    blocks = -(-prod(shape) // block)
    meta = torch.device("meta")
    scale: Tensor | Form = _planned(blocks)
    if nested:
        scale = Codebook(
            Codes.empty((blocks,), 8, "u8", meta),
            _planned(256),
            _planned(-(-blocks // NESTED_BLOCK)),
            Flat(NESTED_BLOCK),
            offset=_planned(),
            table_name="dynamic8",
        )
    return Codebook(
        Codes.empty(shape, 4, "hi4", meta),
        _planned(16),
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
        weight, scale = tensors.get("weight"), tensors.get("SCB")
        wanted = [target.out_features, target.in_features]
        shape = () if weight is None else tuple(weight.shape)
        _require(
            weight is not None and weight.dtype == torch.int8 and _fits(shape, target),
            target,
            f"weight is not int8 {wanted}, as the model wants",
        )
        _require(_floats(scale, shape[0]), target, f"SCB does not have {shape[0]} row scales")
        order = tensors.get("weight_format")
        _require(
            order is None or (order.numel() == 1 and order.item() == 0),
            target,
            "weight_format is not row-major (0)",
        )
        assert weight is not None and scale is not None
        return Affine(
            Codes(weight, 8, shape, "i8"),
            scale.reshape(-1),
            Channel(0),
            factor=1.0 / 127.0,
            dtype=dtype,
        )

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if "SCB" not in headers and "weight_format" not in headers:
            return None
        _missing(("weight", "SCB"), headers, target)
        shape = headers["weight"].shape
        _require(_fits(shape, target), target, f"weight is {list(shape)}, the model wants another")
        return abstract_int8(shape, dtype)


def abstract_int8(shape: tuple[int, ...], dtype: torch.dtype) -> Affine:
    """An int8 form on the meta device."""
    return Affine(
        Codes.empty(shape, 8, "i8", "meta"),
        _planned(shape[0]),
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

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        if wanted.get("load_in_8bit") and not isinstance(form, Affine):
            raise not_exact(
                target.name, f"it holds {kind_words(form)}, the layout 8-bit codes on an even grid"
            )
        if isinstance(form, Affine) and not wanted.get("load_in_4bit"):
            same = form.codes.packing == "i8" and form.grouping == Channel(0)
            if not same or form.factor != 1.0 / 127.0 or form.offset is not None:
                raise not_exact(
                    target.name,
                    "LLM.int8 multiplies codes by a row's largest magnitude, then by 1/127: other"
                    " scales round otherwise",
                )
            return Fit(form, {"load_in_8bit": True})
        return _fit_four_bit(form, target, wanted)

    def encode(self, form: Form) -> dict[str, Tensor]:
        return (self.four if isinstance(form, Codebook) else self.eight).encode(form)

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        four, eight = self.four._kinds(tensors), "SCB" in tensors
        _require(
            bool(four) != eight,
            target,
            "it has both quant_state (4 bits) and SCB (8 bits)"
            if eight
            else "it has neither quant_state (4 bits) nor SCB (8 bits)",
        )
        return (self.eight if eight else self.four).decode(tensors, target, dtype)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if set(headers) == {"weight"}:
            stored = headers["weight"].dtype
            _require(
                stored in FLOAT_DTYPES,
                target,
                f"weight is {stored}, and nothing is there that says what it means",
            )
        return self.four.describe(headers, target, dtype) or self.eight.describe(
            headers, target, dtype
        )


def _fit_four_bit(form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
    """NF4 and FP4 with their scales plain or quantized; plain ones can be made of quantized."""
    if (
        not isinstance(form, Codebook)
        or form.table_name not in KINDS
        or not isinstance(form.grouping, Flat)
        or form.grouping.size not in BLOCK_SIZES
    ):
        raise not_exact(target.name, f"it holds {kind_words(form)}, the layout codes of NF4 or FP4")
    nested = isinstance(form.scale, Codebook)
    wish = wanted.get("bnb_4bit_use_double_quant", nested)
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": form.table_name,
        "bnb_4bit_blocksize": form.grouping.size,
        "bnb_4bit_use_double_quant": wish,
        "bnb_4bit_compute_dtype": str(form.dtype).removeprefix("torch."),
    }
    for name in ("bnb_4bit_quant_type", "bnb_4bit_blocksize"):
        if wanted.get(name, options[name]) != options[name]:
            raise not_exact(target.name, f"{name} is {options[name]}, asked is {wanted[name]}")
    if wish and not nested:
        raise not_exact(target.name, "its scales are float, and quantizing them changes them")
    notes: tuple[str, ...] = ()
    if nested and not wish:
        notes = ("nested scales become plain ones",)
        scale = form.scale
        assert isinstance(scale, Codebook)
        plain = scale.codes.data.is_meta
        form = replace(form, scale=_planned(*scale.shape) if plain else value_of(scale))
    return Fit(form, options, (), notes)
