"""The disk layouts of compressed-tensors as a codec over the affine and the scaled float form.

Relative to the module, with ``in`` and ``out`` features (compressed-tensors 0.20, formats
``pack-quantized``, ``int-quantized``, ``naive-quantized`` and ``float-quantized``)::

    weight_packed      int32 [out, ceil(in * bits / 32)]      codes plus 2**(bits - 1)
    weight_shape       int64 [2]                              out and in
    weight_zero_point  int32 [ceil(out * bits / 32), groups]  each column a stream, plus the same

    weight             int8 or float8_e4m3fn [out, in]        in place of the three above
    weight_zero_point  int8, of the shape of the scale

    weight_scale       float [out, groups], [out, 1], [out], [1], or [blocks, blocks]
    weight_g_idx       int32 [in]                             group of each input column
    weight_scale       uint8 [out, in / 32]                   ``mxfp8-quantized``: powers of two
    input_scale, input_zero_point                             of activations with stored scales

A symmetric weight has no zero point. What the tensors say outranks the config; the config decides
where they say nothing: the width of very narrow packed rows, the sides of ragged blocks, and that
a zero point is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.checkpoint.reader import torch_dtype
from quantmill.findings import QuantmillError, declare
from quantmill.forms import (
    Blocks,
    Channel,
    Codes,
    Form,
    Group,
    Grouping,
    PerTensor,
)
from quantmill.targeting.types import Target
from quantmill_compressed_tensors.config import CompressedConfig
from quantmill_compressed_tensors.damage import refuse, sound
from quantmill_compressed_tensors.foreign import fit, stored_form
from quantmill_compressed_tensors.forms import (
    Layout,
    StoredAffine,
    StoredFloat,
    abstract_float,
    abstract_integer,
)
from quantmill_compressed_tensors.fp4 import (
    E8M0,
    StoredFp4,
    decode_fp4,
    encode_fp4,
    measure_fp4,
    restyled,
)
from quantmill_compressed_tensors.schemes import Args
from quantmill_compressed_tensors.words import pack_rows, unpack_rows, widths
from quantmill_compressed_tensors.zeros import Seen, zero_layout, zeros_in, zeros_out

__all__ = ["CompressedCodec"]

UNREAD = declare("QM-CT-005", "A weight is packed in a way that is not read")

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CompressedCodec(Codec[CompressedConfig]):
    """Packed integers, integers in bytes and FP8."""

    suffixes: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "weight_global_scale",
        "input_global_scale",
    )

    def encode(self, form: Form) -> dict[str, Tensor]:
        if isinstance(form, StoredFp4):
            return encode_fp4(restyled(form))
        form = stored_form(form)
        layout = form.layout
        assert isinstance(form.scale, Tensor)
        shape = layout.scale_shape
        found = {"weight_scale": form.scale if shape is None else form.scale.reshape(shape)}
        if layout.exponents:
            found["weight_scale"] = found["weight_scale"].view(torch.uint8)
        if isinstance(form, StoredFloat):
            found["weight"] = form.values
        elif not layout.packed:
            found["weight"] = form.codes.data.reshape(form.shape)
        else:
            found["weight_packed"] = pack_rows(form.codes)
            found["weight_shape"] = torch.tensor(
                form.shape, dtype=layout.shape_dtype, device=form.scale.device
            )
        if isinstance(form, StoredAffine):
            if layout.zeros != "none":
                found["weight_zero_point"] = zeros_out(form)
            if form.group_index is not None:
                found["weight_g_idx"] = form.group_index
            elif layout.unordered:
                found["weight_g_idx"] = torch.full(
                    (form.shape[1],), -1, dtype=torch.int32, device=form.scale.device
                )
        if form.input_scale is not None:
            found["input_scale"] = form.input_scale
        if form.input_zero_point is not None:
            found["input_zero_point"] = form.input_zero_point
        return found

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        seen = {name: Seen(item.dtype, tuple(item.shape)) for name, item in tensors.items()}
        style = self._style(seen, target)
        if style:
            return decode_fp4(tensors, style, target, dtype)
        skeleton = self._measure(seen, target, dtype)
        if skeleton is None:
            raise refuse(target, f"it has only {', '.join(sorted(seen)) or 'nothing'}")
        grouping, layout = skeleton.grouping, skeleton.layout
        scale = tensors["weight_scale"].reshape(grouping.scale_shape(skeleton.shape))
        scale = scale.view(E8M0) if layout.exponents else scale
        inputs: dict[str, Any] = {
            name: tensors.get(name) for name in ("input_scale", "input_zero_point")
        }
        if isinstance(skeleton, StoredFloat):
            if "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].float().any()):
                raise refuse(target, "it has zero points other than 0 for FP8 values")
            return sound(replace(skeleton, values=tensors["weight"], scale=scale, **inputs), target)
        bits, (rows, columns) = skeleton.codes.bits, skeleton.shape
        if layout.packed:
            said = tensors["weight_shape"].tolist()
            if said != [rows, columns]:
                raise refuse(target, f"weight_shape says {said}, the model wants {[rows, columns]}")
            codes = unpack_rows(tensors["weight_packed"], bits, columns)
        else:
            codes = Codes(tensors["weight"], 8, (rows, columns), "i8")
        order = self._order(tensors.get("weight_g_idx"), skeleton, target)
        form = replace(
            skeleton,
            codes=codes,
            scale=scale,
            offset=zeros_in(tensors.get("weight_zero_point"), skeleton, scale.device),
            group_index=order,
            layout=replace(layout, unordered="weight_g_idx" in tensors and order is None),
            **inputs,
        )
        return sound(form, target)

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        return fit(form, target, wanted)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        seen = {
            name: Seen(torch_dtype(item.dtype), tuple(item.shape)) for name, item in headers.items()
        }
        style = self._style(seen, target)
        if style:
            pairs = {name: (item.dtype, item.shape) for name, item in seen.items()}
            return measure_fp4(pairs, style, target, dtype)
        form = self._measure(seen, target, dtype)
        if form is None:
            return None
        inputs: dict[str, Any] = {
            name: torch.empty(seen[name].shape, dtype=seen[name].dtype, device="meta")
            for name in ("input_scale", "input_zero_point")
            if name in seen
        }
        return replace(form, **inputs)

    def _style(self, seen: Mapping[str, Seen], target: Target) -> str:
        """The format of 4-bit floats that the tensors are in, or nothing."""
        packed = seen.get("weight_packed")
        if packed is None or packed.dtype not in (torch.uint8, torch.int8):
            return ""
        group = self.config.scheme_of(target)
        args = group.weights if group is not None else None
        if args is not None and args.type == "float" and args.num_bits != 4:
            raise QuantmillError(
                UNREAD(
                    target.name,
                    f"its group packs {args.words}, and of packed floats those of 4 bits are read",
                    "decompress it with the compressed-tensors library first",
                )
            )
        size = args.group_size if args is not None else None
        inputs = group.input_activations if group is not None else None
        if inputs is not None and inputs.is_nvfp4 and "input_global_scale" not in seen:
            raise refuse(target, "input_global_scale is missing, and its activations are NVFP4")
        tensor = "weight_global_scale" in seen or size == 16
        return "nvfp4-pack-quantized" if tensor else "mxfp4-pack-quantized"

    def _measure(
        self, seen: Mapping[str, Seen], target: Target, dtype: torch.dtype
    ) -> StoredAffine | StoredFloat | None:
        """The form on the meta device; None when the weight is a float one or there is none."""
        weight, packed = seen.get("weight"), seen.get("weight_packed")
        if packed is None and weight is not None and weight.dtype not in (torch.int8, *FLOAT8):
            return None
        if packed is None and weight is None:
            return None
        group = self.config.scheme_of(target)
        args = group.weights if group is not None and group.weights is not None else None
        scale = seen.get("weight_scale")
        if scale is None:
            raise refuse(target, "weight_scale is missing")
        narrow = weight is not None and weight.dtype in FLOAT8
        exponents = narrow and scale.dtype in (torch.uint8, E8M0)
        if scale.dtype not in SCALES and not exponents:
            raise refuse(target, f"weight_scale is {scale.dtype}, not a float")
        inputs = group.input_activations if group is not None else None
        if inputs is not None and not inputs.dynamic and "input_scale" not in seen:
            raise refuse(target, "input_scale is missing, and its activations have stored scales")
        shape = (target.out_features, target.in_features)
        grouping = self._grouping(scale.shape, shape, args, target)
        zeros = seen.get("weight_zero_point")
        if zeros is None and args is not None and args.type == "int" and not args.symmetric:
            raise refuse(target, "weight_zero_point is missing, and its group is asymmetric")
        if packed is not None:
            bits = self._bits(packed, seen, shape, args, target)
            if isinstance(grouping, Channel) and "weight_g_idx" in seen:
                grouping = Group(shape[1])  # the index counts groups
            layout = replace(
                zero_layout(zeros, bits, grouping, shape, target),
                packed=True,
                scale_shape=scale.shape,
                shape_dtype=seen["weight_shape"].dtype,
            )
            return abstract_integer(
                shape,
                bits,
                grouping,
                layout,
                scale.dtype,
                dtype,
                ordered="weight_g_idx" in seen,
            )
        assert weight is not None
        if weight.shape != shape:
            raise refuse(target, f"weight is {list(weight.shape)}, the model wants {list(shape)}")
        if weight.dtype in FLOAT8:
            layout = Layout(False, scale.shape, exponents=exponents)
            kind = E8M0 if exponents else scale.dtype
            return abstract_float(shape, weight.dtype, grouping, layout, kind, dtype)
        if zeros is not None and (zeros.dtype != torch.int8 or zeros.shape != scale.shape):
            raise refuse(
                target,
                f"weight_zero_point is {zeros.dtype} {list(zeros.shape)}, not int8"
                f" {list(scale.shape)}",
            )
        layout = Layout(False, scale.shape)
        if zeros is not None:
            layout = replace(layout, zeros="plain", zeros_shape=zeros.shape)
        return abstract_integer(
            shape, 8, grouping, layout, scale.dtype, dtype, ordered="weight_g_idx" in seen
        )

    def _bits(
        self,
        packed: Seen,
        seen: Mapping[str, Seen],
        shape: tuple[int, int],
        args: Args | None,
        target: Target,
    ) -> int:
        if packed.dtype != torch.int32:
            raise refuse(target, f"weight_packed is {packed.dtype}, not int32")
        said = seen.get("weight_shape")
        if said is None or said.shape != (2,):
            raise refuse(target, "weight_shape is missing or does not hold two numbers")
        fitting = widths(shape[1], packed.shape[1]) if len(packed.shape) == 2 else []
        if not fitting or packed.shape[0] != shape[0]:
            raise refuse(
                target,
                f"weight_packed is {list(packed.shape)}, the model wants {shape[0]} rows of"
                f" {shape[1]} codes",
            )
        if args is not None and args.num_bits in fitting:
            return args.num_bits
        if len(fitting) > 1:
            raise refuse(target, f"its rows may hold {fitting} bits, and no group says which")
        return fitting[0]

    def _grouping(
        self,
        scale: tuple[int, ...],
        shape: tuple[int, int],
        args: Args | None,
        target: Target,
    ) -> Grouping:
        """What shares a scale, by the shape of ``weight_scale``."""
        rows, columns = shape
        block = args.block if args is not None and args.means == "block" else None
        if block is not None and scale == Blocks(*block).scale_shape(shape):
            return Blocks(*block)
        if scale in ((), (1,)) and (rows > 1 or args is None or args.means == "tensor"):
            return PerTensor()
        if scale in ((rows,), (rows, 1)):
            return Channel(0)
        if len(scale) == 2 and scale[0] == rows and 0 < scale[1] <= columns:
            said = args is not None and not (args.strategy is None and args.group_size is None)
            size = (args.group_size or columns) if args and said else columns // scale[1]
            if -(-columns // size) == scale[1]:
                return Group(size)
            raise refuse(
                target,
                f"weight_scale is {list(scale)} for a weight of {list(shape)}, and its group is"
                f" {args.words if args else 'none'}",
            )
        raise refuse(target, f"weight_scale is {list(scale)} for a weight of {list(shape)}")

    def _order(self, index: Tensor | None, form: StoredAffine, target: Target) -> Tensor | None:
        """The group of each input column, or None where the file has none or says -1."""
        if index is None:
            return None
        columns, grouping = form.shape[1], form.grouping
        if index.shape != (columns,) or index.dtype != torch.int32:
            raise refuse(
                target, f"weight_g_idx is {index.dtype} {list(index.shape)}, not int32 [{columns}]"
            )
        low, high = int(index.min()), int(index.max())
        if low == high == -1:
            return None
        groups = grouping.scale_shape(form.shape)[1] if isinstance(grouping, Group) else 0
        if low < 0 or high >= groups:
            raise refuse(
                target, f"weight_g_idx names groups {low} to {high}, and there are {groups}"
            )
        return index
