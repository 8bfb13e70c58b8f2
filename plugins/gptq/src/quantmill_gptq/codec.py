"""The disk layout of GPTQ checkpoints as a codec over the affine form.

Relative to the module, with ``in`` and ``out`` features and ``groups`` of input columns::

    qweight  int32 [in * bits / 32, out]      each column a row of codes
    qzeros   int32 [groups, out * bits / 32]  each row of zero points
    scales   float16 or bfloat16 [groups, out]
    g_idx    int32 [in]                       group of each input column

How codes lie in words is :mod:`quantmill_gptq.packing`'s.

Format ``gptq`` (v1) stores zero points minus one. With 2, 4 and 8 bits its writers subtract the
ones from whole 32-bit words, so a zero point of 0 borrows from the next field; with 3 bits they
work on fields, modulo 8. ``gptq_v2`` and ``gptq_p`` store them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Codes, Form, Group
from quantmill.forms.fit import Conditions, fit_integers, is_symmetric
from quantmill.targeting.types import Target
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.packing import fields, packed
from quantmill_gptq.widths import PLANAR_ONLY, is_planar, period, widths, words

__all__ = ["GptqCodec", "abstract_form"]

BAD_TENSORS = declare("QM-GPTQ-001", "A quantized weight's tensors contradict each other")


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


def abstract_form(
    target: Target,
    bits: int,
    size: int,
    groups: int,
    ordered: bool,
    scale: torch.dtype,
    dtype: torch.dtype,
    *,
    same: bool = False,
) -> Affine:
    """An affine form on the meta device; ``same``: all its zero points are one number."""
    shape = (target.out_features, target.in_features)
    meta = torch.device("meta")
    zeros = torch.empty(1 if same else (shape[0], groups), dtype=torch.uint8, device=meta)
    return Affine(
        Codes.empty(shape, bits, "dense", meta),
        torch.empty(shape[0], groups, dtype=scale, device=meta),
        Group(size),
        zeros.expand(shape[0], groups),
        "zero",
        torch.empty(shape[1], dtype=torch.int32, device=meta) if ordered else None,
        dtype=dtype,
    )


class GptqCodec(Codec[GptqConfig]):
    """Formats v1 and v2 at 2, 3, 4 and 8 bits, the planar one at 2 to 8."""

    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine) and isinstance(form.grouping, Group)
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        out_features, in_features = form.shape
        bits = form.codes.bits
        groups = form.scale.shape[1]
        planar = is_planar(self.config.checkpoint_format, bits)
        if form.codes.data.is_meta:
            meta = torch.device("meta")
            return {
                "qweight": torch.empty(
                    words(in_features, bits), out_features, dtype=torch.int32, device=meta
                ),
                "qzeros": torch.empty(
                    groups, words(out_features, bits), dtype=torch.int32, device=meta
                ),
                "scales": form.scale.t().contiguous(),
                "g_idx": torch.empty(in_features, dtype=torch.int32, device=meta),
            }
        index = form.group_index
        if index is None:
            index = torch.arange(in_features, device=form.scale.device) // form.grouping.size
        zeros = form.offset.t().contiguous()
        first = self.config.checkpoint_format == "gptq"
        if first and bits == 3:
            zeros = (zeros - 1) & 7
        qzeros = packed(zeros, bits, planar)
        if first and bits != 3:
            qzeros = _signed(qzeros.to(torch.int64) - _ones(bits))
        if planar or in_features * bits % 32:
            stream = packed(form.codes.unpack(), bits, planar)
        else:
            data = form.codes.repacked("dense").data
            stream = data.view(torch.int32).reshape(out_features, -1)
        return {
            "qweight": stream.t().contiguous(),
            "qzeros": qzeros,
            "scales": form.scale.t().contiguous(),
            "g_idx": index.to(torch.int32).clone(),
        }

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        bits, size, groups = self._measure(shapes, target)
        out_features, in_features = target.out_features, target.in_features
        for name in ("qweight", "qzeros"):
            if tensors[name].dtype != torch.int32:
                raise _refuse(target, f"{name} is {tensors[name].dtype}, not int32")
        scales = tensors["scales"]
        if not scales.is_floating_point():
            raise _refuse(target, f"scales is {scales.dtype}, no float type")
        if not bool(torch.isfinite(scales).all()):
            raise _refuse(target, "scales holds NaN or infinity")
        qweight = tensors["qweight"].t().contiguous()
        planar = is_planar(self.config.checkpoint_format, bits)
        if planar or in_features * bits % 32:
            codes = Codes.pack(fields(qweight, bits, in_features, planar), bits, "dense")
        else:
            data = qweight.view(torch.uint8).reshape(-1)
            codes = Codes(data, bits, (out_features, in_features), "dense")
        qzeros = tensors["qzeros"].contiguous()
        first = self.config.checkpoint_format == "gptq"
        if first and bits != 3:
            qzeros = _signed(qzeros.to(torch.int64) + _ones(bits))
        zeros = fields(qzeros, bits, out_features, planar)
        if first and bits == 3:
            zeros = (zeros + 1) & 7
        return Affine(
            codes,
            scales.t().contiguous(),
            Group(size),
            zeros.t().contiguous(),
            "zero",
            self._order(tensors.get("g_idx"), size, groups, target),
            dtype=dtype,
        )

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        seen = Conditions()
        size = wanted.get("group_size")
        even = fit_integers(
            form,
            bits=(wanted["bits"],)
            if "bits" in wanted
            else _able(wanted.get("checkpoint_format", "gptq"), target),
            zeros="middle" if wanted.get("sym") else "integer",
            scales=(torch.float16, torch.bfloat16),
            size=target.in_features if size == -1 else size,
            ordered=bool(wanted.get("desc_act", True)),
            seen=seen,
        )
        assert isinstance(even.grouping, Group) and isinstance(even.offset, Tensor)
        width = even.grouping.size
        options: dict[str, Any] = {
            "bits": even.codes.bits,
            "group_size": -1 if width >= target.in_features and size != width else width,
            "desc_act": even.group_index is not None,
        }
        if not even.offset.is_meta:
            options["sym"] = is_symmetric(even)
            written = "gptq" if options["sym"] else "gptq_v2"
            if options["bits"] in PLANAR_ONLY:
                written = "gptq_p"
            options["checkpoint_format"] = wanted.get("checkpoint_format", written)
        return Fit(even, options, tuple(seen.unless), tuple(seen.notes))

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if "qweight" not in headers:
            return None
        shapes = {name: tuple(item.shape) for name, item in headers.items()}
        bits, size, groups = self._measure(shapes, target)
        scale = torch.bfloat16 if headers["scales"].dtype == "BF16" else torch.float16
        if headers["scales"].dtype == "F32":
            scale = torch.float32
        ordered, same = self.config.desc_act, self.config.sym
        return abstract_form(target, bits, size, groups, ordered, scale, dtype, same=same)

    def _measure(
        self, shapes: Mapping[str, tuple[int, ...]], target: Target
    ) -> tuple[int, int, int]:
        """Bits, group size and number of groups, from the tensors: they outrank the config."""
        out_features, in_features = target.out_features, target.in_features
        missing = [name for name in ("qweight", "qzeros", "scales") if name not in shapes]
        if missing:
            raise _refuse(target, f"{' and '.join(missing)} are missing")
        stored = shapes["qweight"]
        if len(stored) != 2 or stored[1] != out_features:
            raise _refuse(
                target,
                f"qweight is {list(stored)}, the model wants {out_features} columns"
                f" of {in_features} codes",
            )
        able = _able(self.config.checkpoint_format, target)
        found = [bits for bits in able if words(in_features, bits) == stored[0]]
        if not found:
            raise _refuse(
                target,
                f"qweight is {list(stored)}: {stored[0]} words are not {in_features} codes of"
                f" {', '.join(map(str, able[:-1]))} or {able[-1]} bits",
            )
        # A narrow one may be read in several ways: then the config decides.
        bits = self.config.bits if self.config.bits in found else found[-1]
        groups = shapes["scales"][0] if shapes["scales"] else 0
        if shapes["scales"] != (groups, out_features) or not 0 < groups <= in_features:
            raise _refuse(
                target, f"scales is {list(shapes['scales'])}, not [groups, {out_features}]"
            )
        wanted = (groups, words(out_features, bits))
        if shapes["qzeros"] != wanted:
            raise _refuse(
                target,
                f"qzeros is {list(shapes['qzeros'])}, and {groups} groups of {out_features} zero"
                f" points of {bits} bits are {list(wanted)}",
            )
        size = self.config.group_size
        if size <= 0 or -(-in_features // size) != groups:
            size = -(-in_features // groups)
        return bits, size, groups

    def _order(self, index: Tensor | None, size: int, groups: int, target: Target) -> Tensor | None:
        if index is None:
            if self.config.desc_act:
                raise _refuse(target, "it has no g_idx, and desc_act is set")
            return None
        if index.shape != (target.in_features,):
            raise _refuse(target, f"g_idx is {list(index.shape)}, not [{target.in_features}]")
        if index.dtype not in (torch.int32, torch.int64):
            raise _refuse(target, f"g_idx is {index.dtype}, not int32")
        plain = torch.arange(target.in_features, device=index.device) // size
        if not self.config.desc_act and torch.equal(index.to(torch.int64), plain):
            return None
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise _refuse(target, f"g_idx names groups {low} to {high}, and there are {groups}")
        return index.to(torch.int32)


def _able(checkpoint_format: str, target: Target) -> tuple[int, ...]:
    """Widths of codes that a target can have: planes take whole blocks only."""
    sizes = (target.in_features, target.out_features)
    return tuple(
        bits
        for bits in widths(checkpoint_format)
        if not is_planar(checkpoint_format, bits) or not any(n % period(bits) for n in sizes)
    )


def _ones(bits: int) -> int:
    return sum(1 << position for position in range(0, 32, bits))


def _signed(words: Tensor) -> Tensor:
    """The low 32 bits of int64 words as int32."""
    low = words & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
