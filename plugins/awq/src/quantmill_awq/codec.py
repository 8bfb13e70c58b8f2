"""The disk layouts of AWQ checkpoints as a codec over the affine form.

Relative to the module, for 4 bits and groups of ``g`` input columns::

    GEMM   qweight  int32 [in, out / 8]     eight codes of one row, nibble i is column ORDER[i]
           qzeros   int32 [in / g, out / 8] the same order
           scales   float16 or bfloat16 [in / g, out]
    GEMV   qweight  int32 [out, in / 8]     eight codes of one row, in order
           qzeros   int32 [out, w]          in order, padded
           scales   float16 [out, 8 * w]    padded
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Codes, Form, Group
from quantmill.forms.fit import Conditions, fit_integers
from quantmill.targeting.types import Target
from quantmill_awq.config import AwqConfig

__all__ = ["AwqCodec", "abstract_form"]

BAD_TENSORS = declare("QM-AWQ-001", "A quantized weight's tensors contradict each other")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, within eight, that each nibble of a GEMM word holds."""
_FROM = tuple(ORDER.index(column) for column in range(8))


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


def abstract_form(
    target: Target, size: int, groups: int, scale: torch.dtype, dtype: torch.dtype
) -> Affine:
    """A form on the meta device."""
    shape = (target.out_features, target.in_features)
    meta = torch.device("meta")
    return Affine(
        Codes.empty(shape, 4, "dense", meta),
        torch.empty(shape[0], groups, dtype=scale, device=meta),
        Group(size),
        torch.empty(shape[0], groups, dtype=torch.uint8, device=meta),
        "zero",
        dtype=dtype,
    )


def _fields(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """uint8 ``[rows, 8 * n]`` of int32 ``[rows, n]``: column ``c`` of eight is nibble
    ``order[c]``."""
    octets = words.contiguous().view(torch.uint8).reshape(words.shape[0], -1, 4)
    nibbles = torch.stack([octets & 0x0F, octets >> 4], dim=-1).reshape(words.shape[0], -1, 8)
    return nibbles[:, :, list(order)].reshape(words.shape[0], -1)


def _words(fields: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 ``[rows, n]`` of uint8 ``[rows, 8 * n]``: nibble ``i`` is column ``order[i]``."""
    nibbles = fields.reshape(fields.shape[0], -1, 8)[:, :, list(order)]
    octets = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32).reshape(fields.shape[0], -1)


_PLAIN = tuple(range(8))
_AT_ONCE = 1 << 18
"""Weights that are turned at a time, so that what that takes stays in a processor's cache."""


def _turned(words: Tensor) -> Codes:
    """Codes ``[out, in]`` of GEMM's int32 ``[in, out / 8]``."""
    columns = words.shape[0]
    packed = Codes.empty((8 * words.shape[1], columns), 4, "dense", words.device)
    # Eight rows of codes end with a byte, however many columns there are.
    step, width = max(1, _AT_ONCE // max(1, 8 * columns)), 4 * columns
    for first in range(0, words.shape[1], step):
        codes = _fields(words[:, first : first + step], _FROM).t()
        part = Codes.pack(codes, 4, "dense").data
        packed.data[first * width : first * width + part.numel()] = part
    return packed


class AwqCodec(Codec[AwqConfig]):
    """Reads GEMM and GEMV, writes the one that the config names."""

    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def encoding_bytes(self, form: Form) -> int:
        return 4 * prod(form.shape)

    def decoding_bytes(self, form: Form) -> int:
        return form.nbytes + 5 * min(prod(form.shape), _AT_ONCE)

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine) and isinstance(form.grouping, Group)
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        out_features, in_features = form.shape
        groups = form.scale.shape[1]
        gemm = self.config.version == "gemm"
        width = _zeros_width(groups, form.grouping.size)
        if form.codes.data.is_meta:
            shapes = (
                ((in_features, out_features // 8), (groups, out_features // 8))
                if gemm
                else ((out_features, in_features // 8), (out_features, width))
            )
            scales = (groups, out_features) if gemm else (out_features, 8 * width)
            meta = torch.device("meta")
            return {
                "qweight": torch.empty(shapes[0], dtype=torch.int32, device=meta),
                "qzeros": torch.empty(shapes[1], dtype=torch.int32, device=meta),
                "scales": torch.empty(scales, dtype=form.scale.dtype, device=meta),
            }
        codes = form.codes.unpack()
        if gemm:
            return {
                "qweight": _words(codes.t().contiguous(), ORDER),
                "qzeros": _words(form.offset.t().contiguous(), ORDER),
                "scales": form.scale.t().contiguous(),
            }
        pad = 8 * width - groups
        return {
            "qweight": _words(codes, _PLAIN),
            "qzeros": _words(torch.nn.functional.pad(form.offset, (0, pad)), _PLAIN),
            "scales": torch.nn.functional.pad(form.scale, (0, pad)).contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        version, size, groups = self._measure(shapes, target)
        qweight, qzeros = tensors["qweight"], tensors["qzeros"]
        if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
            raise _refuse(target, "qweight and qzeros are not int32")
        if not tensors["scales"].is_floating_point():
            raise _refuse(target, f"scales is {tensors['scales'].dtype}, no float type")
        if version == "gemm":
            packed = _turned(qweight)
            zeros = _fields(qzeros, _FROM).t().contiguous()
            scale = tensors["scales"].t().contiguous()
        else:
            # In order already: the words are the dense stream.
            data = qweight.contiguous().view(torch.uint8).reshape(-1)
            packed = Codes(data, 4, (target.out_features, target.in_features), "dense")
            zeros = _fields(qzeros, _PLAIN)[:, :groups].contiguous()
            scale = tensors["scales"][:, :groups].contiguous()
        if not bool(torch.isfinite(scale).all()):
            raise _refuse(target, "scales holds NaN or infinity")
        return Affine(packed, scale, Group(size), zeros, "zero", dtype=dtype)

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        seen = Conditions()
        size = wanted.get("group_size")
        even = fit_integers(
            form,
            bits=(4,),
            zeros="integer" if wanted.get("zero_point", True) else "middle",
            scales=(torch.float16, torch.bfloat16),
            size=target.in_features if size == -1 else size,
            seen=seen,
        )
        assert isinstance(even.grouping, Group)
        width = even.grouping.size
        options = {
            "bits": 4,
            "group_size": -1 if width >= target.in_features and size != width else width,
            # Zero points are stored in any case: this is right for every reader.
            "zero_point": wanted.get("zero_point", True),
            "version": wanted.get("version", "gemm"),
        }
        return Fit(even, options, tuple(seen.unless), tuple(seen.notes))

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if "qweight" not in headers:
            return None
        shapes = {name: tuple(item.shape) for name, item in headers.items()}
        _, size, groups = self._measure(shapes, target)
        names = {"BF16": torch.bfloat16, "F32": torch.float32}
        scale = names.get(headers["scales"].dtype, torch.float16)
        return abstract_form(target, size, groups, scale, dtype)

    def _measure(
        self, shapes: Mapping[str, tuple[int, ...]], target: Target
    ) -> tuple[str, int, int]:
        """Layout, group size and groups, from the tensors: they outrank the config."""
        out_features, in_features = target.out_features, target.in_features
        missing = [name for name in self.suffixes if name not in shapes]
        if missing:
            raise _refuse(target, f"{' and '.join(missing)} are missing")
        # Small modules can be read both ways: then the config decides.
        layouts = [self._gemm, self._gemv]
        if self.config.version == "gemv":
            layouts.reverse()
        for layout in layouts:
            found = layout(shapes, out_features, in_features)
            if found is not None:
                return found
        raise _refuse(
            target,
            ", ".join(f"{name} {list(shapes[name])}" for name in self.suffixes)
            + f" are neither GEMM nor GEMV of {[out_features, in_features]}",
        )

    def _gemm(
        self, shapes: Mapping[str, tuple[int, ...]], out_features: int, in_features: int
    ) -> tuple[str, int, int] | None:
        groups = shapes["scales"][0] if shapes["scales"] else 0
        wanted = {
            "qweight": (in_features, out_features // 8),
            "qzeros": (groups, out_features // 8),
            "scales": (groups, out_features),
        }
        if groups == 0 or any(shapes[name] != shape for name, shape in wanted.items()):
            return None
        size = self.config.group_size
        if size <= 0 or -(-in_features // size) != groups:
            size = -(-in_features // groups)
        return "gemm", size, groups

    def _gemv(
        self, shapes: Mapping[str, tuple[int, ...]], out_features: int, in_features: int
    ) -> tuple[str, int, int] | None:
        if shapes["qweight"] != (out_features, in_features // 8):
            return None
        width = shapes["qzeros"][-1] if shapes["qzeros"] else 0
        if shapes["qzeros"] != (out_features, width) or shapes["scales"] != (
            out_features,
            8 * width,
        ):
            return None
        asked = self.config.group_size if self.config.group_size > 0 else in_features
        for size in (asked, 128, 64, 32, 16, in_features):
            groups = -(-in_features // size)
            if width == _zeros_width(groups, size):
                return "gemv", size, groups
        # Padded otherwise than AutoAWQ does: then the config says what the groups are.
        groups = -(-in_features // asked)
        return ("gemv", asked, groups) if groups <= 8 * width else None


def _zeros_width(groups: int, size: int) -> int:
    """Words per row of GEMV's qzeros: padded as its kernel reads them."""
    multiple = {64: 2, 32: 4, 16: 8}.get(size, 1)
    words = -(-groups // 8)
    return -(-words // multiple) * multiple
