"""The disk layouts of FP8 checkpoints as codecs over the scaled float form.

Relative to the module, with ``in`` and ``out`` features and blocks of ``b0 x b1``::

    quant_method fp8 (DeepSeek-V3)
    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float32 (bfloat16, float16) or float8_e8m0fnu (uint8: its bytes)
                      [ceil(out / b0), ceil(in / b1)], or one number for the whole weight
    activation_scale  float32 []  static activations only

    the same as AutoFP8 and vLLM name it
    weight_scale      as above, or a scale per row, float [out, 1] or [out]
    input_scale       float32 []  static activations only

    quant_method fbgemm_fp8
    weight            float8_e4m3fn [out, in]
    weight_scale      float32 [out, 1]
    input_scale_ub    float32 [1]  in early files only

In both ``value = weight * scale``, whatever the name says: ``inv`` is the inverse of what the
weight was multiplied with. Blocks start at the first row and column; those at the end are cut.
Their size is the config's and never inferred from the number of scales.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Blocks, Channel, Form, Group, Grouping, PerTensor, ScaledFloat
from quantmill.forms.fit import Conditions, fit_floats
from quantmill.targeting.types import Target
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config
from quantmill_fp8.form import VALUES, Fp8Weight, Layout, abstract_form, joined, parted

__all__ = ["BlockCodec", "RowCodec", "grouping_of"]

BAD_TENSORS = declare("QM-FP8-001", "A quantized weight's tensors contradict each other")
BAD_SCALE = declare(
    "QM-FP8-002", "A scale of a quantized weight is zero, negative, NaN or infinite"
)
_SCALES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
    "U8": getattr(torch, "float8_e8m0fnu", torch.uint8),
}
"""Dtypes of scales by their code in safetensors, as they are in memory."""
ConfigT = TypeVar("ConfigT", bound=MethodConfig)


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TENSORS(target.name, cause, "the checkpoint is damaged: get it again")
    )


def grouping_of(config: Fp8Config) -> Grouping:
    """What shares a scale."""
    size = config.weight_block_size
    return PerTensor() if size is None else Blocks(*size)


class _Fp8Codec(Codec[ConfigT]):
    """What the layouts share; they differ in names and in the shape of scales."""

    scale_names: ClassVar[tuple[str, ...]]
    """Of the scales; what is made gets the first."""
    activation_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _grouping(self, scale: tuple[int, ...], shape: tuple[int, int]) -> Grouping:
        """What shares a scale, of a weight ``[out, in]`` with scales of such a shape."""

    @abstractmethod
    def _stored_shape(self, grouping: Grouping, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scales in the file."""

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, ScaledFloat) and isinstance(form.scale, Tensor)
        layout = form.layout if isinstance(form, Fp8Weight) else Layout()
        rows, columns = form.shape
        scale = form.scale
        if layout.shape is not None:
            scale = scale.reshape(layout.shape)
        elif not isinstance(form.grouping, PerTensor):
            scale = scale.reshape(self._stored_shape(form.grouping, (rows, columns)))
        if layout.as_bytes:
            scale = scale.view(torch.uint8)
        stored = {"weight": form.values, layout.scale or self.scale_names[0]: scale}
        _, activation = parted(form)
        if activation is not None:
            stored[layout.activation or self.activation_names[0]] = activation
        return stored

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        name, given = self._names(set(tensors), target)
        weight, scale = tensors["weight"], tensors[name]
        if weight.dtype != VALUES:
            raise _refuse(target, f"weight is {weight.dtype}, not float8_e4m3fn")
        as_bytes = scale.dtype == torch.uint8 and _SCALES["U8"] != torch.uint8
        if as_bytes:
            scale = scale.view(_SCALES["U8"])
        if scale.dtype not in _SCALES.values() or scale.dtype == torch.uint8:
            raise _refuse(target, f"{name} is {scale.dtype}")
        shape, grouping = self._fit(tuple(weight.shape), name, tuple(scale.shape), target)
        layout = Layout(name, given, tuple(scale.shape), as_bytes)
        if not isinstance(grouping, PerTensor):
            scale = scale.reshape(grouping.scale_shape(shape))
        form = Fp8Weight(weight, scale, grouping, dtype, layout)
        self._check(form, scale, name, target)
        activation = tensors.get(given)
        if activation is not None:
            self._positive(activation, given, target)
        return joined(form, activation)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        weight = headers.get("weight")
        eight = weight is not None and weight.dtype.startswith("F8_")
        others = {*self.scale_names, *self.activation_names}
        if not eight and others.isdisjoint(headers):
            return None
        name, activation = self._names(set(headers), target)
        weight, scale = headers["weight"], headers[name]
        if weight.dtype != "F8_E4M3":
            raise _refuse(target, f"weight is {weight.dtype}, not F8_E4M3")
        if scale.dtype not in _SCALES:
            raise _refuse(target, f"{name} is {scale.dtype}")
        shape, grouping = self._fit(tuple(weight.shape), name, tuple(scale.shape), target)
        layout = Layout(name, activation, tuple(scale.shape), scale.dtype == "U8")
        form = abstract_form(shape, grouping, _SCALES[scale.dtype], dtype, layout)
        given = headers.get(activation)
        if given is None:
            return form
        kind = _SCALES.get(given.dtype, torch.float32)
        return joined(form, torch.empty(tuple(given.shape), dtype=kind, device="meta"))

    def _names(self, names: set[str], target: Target) -> tuple[str, str]:
        """The names of the scales and of the scale of activations (if there is one)."""
        scales = [name for name in self.scale_names if name in names]
        missing = [] if "weight" in names else ["weight"]
        missing += [] if scales else [self.scale_names[0]]
        if missing:
            raise _refuse(
                target, f"it has {', '.join(sorted(names))} and no {' and no '.join(missing)}"
            )
        if len(scales) > 1:
            raise _refuse(target, f"it has both {' and '.join(scales)}")
        given = [name for name in self.activation_names if name in names]
        return scales[0], given[0] if given else ""

    def _fit(
        self, weight: tuple[int, ...], name: str, scale: tuple[int, ...], target: Target
    ) -> tuple[tuple[int, int], Grouping]:
        """Shape and grouping of the weight, if both tensors have the shapes they must have."""
        wanted = (target.out_features, target.in_features)
        if weight != wanted:
            raise _refuse(target, f"weight is {list(weight)}, the model wants {list(wanted)}")
        grouping = self._grouping(scale, wanted)
        needed = self._stored_shape(grouping, wanted)
        # A row's scale comes as [out, 1] or [out], a tensor's as [], [1] or [1, 1].
        flat = isinstance(grouping, PerTensor | Channel)
        if scale != needed and not (flat and prod(scale) == prod(needed) and len(scale) < 3):
            raise _refuse(
                target,
                f"{name} is {list(scale)}, and {self._why()} of a weight"
                f" {list(wanted)} need {list(needed)}",
            )
        return wanted, grouping

    def _why(self) -> str:
        return "the scales"

    def _check(self, form: ScaledFloat, scale: Tensor, name: str, target: Target) -> None:
        """Refuse scales that no quantizer makes.

        Raises:
            QuantmillError: one is not finite and positive. Zero is allowed for zeros.
        """
        wide = scale.to(torch.float32)
        bad = ~(torch.isfinite(wide) & (wide > 0))
        if not bool(bad.any()):
            return
        zero = wide == 0
        if bool((bad == zero).all()):
            inside = form.grouping.expand(zero, form.shape)
            if not bool((inside & (form.values.view(torch.uint8) & 0x7F != 0)).any()):
                return
        index = int(torch.argmax(bad.reshape(-1).to(torch.uint8)).item())
        raise self._bad_scale(target, name, index, float(wide.reshape(-1)[index].item()))

    def _positive(self, activation: Tensor, name: str, target: Target) -> None:
        if activation.numel() != 1 or not activation.is_floating_point():
            raise _refuse(
                target,
                f"{name} is {activation.dtype} {list(activation.shape)}, not a single float",
            )
        value = float(activation.item())
        if not 0 < value < float("inf"):
            raise self._bad_scale(target, name, 0, value)

    @staticmethod
    def _bad_scale(target: Target, name: str, index: int, value: float) -> QuantmillError:
        return QuantmillError(
            BAD_SCALE(
                target.name,
                f"{name} is {value} at element {index}, and a scale is finite and positive",
                "the checkpoint is damaged: get it again",
            )
        )


class BlockCodec(_Fp8Codec[Fp8Config]):
    """``fp8``: a scale per block, or one for all."""

    scale_names: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight_scale")
    activation_names: ClassVar[tuple[str, ...]] = ("activation_scale", "input_scale")
    suffixes: ClassVar[tuple[str, ...]] = ("weight", *scale_names, *activation_names)

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        seen, grouping = Conditions(), None
        if "weight_block_size" in wanted:
            size = wanted["weight_block_size"]
            grouping = PerTensor() if size is None else Blocks(*size)
        elif isinstance(form, ScaledFloat) and isinstance(form.grouping, Group):
            grouping = Blocks(1, form.grouping.size)
        elif isinstance(form, ScaledFloat) and isinstance(form.grouping, Channel):
            grouping = Blocks(1, 128)
        scales: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
        power = {"ue8m0": (_SCALES["F8_E8M0"],), "float": scales}.get(str(wanted.get("scale_fmt")))
        made = fit_floats(
            form,
            values=(VALUES,),
            scales=power or (*scales, _SCALES["F8_E8M0"]),
            grouping=grouping,
            seen=seen,
        )
        size = made.grouping
        assert isinstance(made.scale, Tensor)
        options = {
            "weight_block_size": [size.rows, size.columns] if isinstance(size, Blocks) else None,
            "scale_fmt": "ue8m0" if made.scale.dtype == _SCALES["F8_E8M0"] else "float",
        }
        return Fit(made, options, tuple(seen.unless), tuple(seen.notes))

    def _names(self, names: set[str], target: Target) -> tuple[str, str]:
        scale, activation = super()._names(names, target)
        if self.config.activation_scheme == "static" and not activation:
            raise _refuse(
                target,
                f"{self.activation_names[0]} is missing, and the config says"
                " activation_scheme=static",
            )
        return scale, activation

    def _grouping(self, scale: tuple[int, ...], shape: tuple[int, int]) -> Grouping:
        asked = grouping_of(self.config)
        # A config that names no block says nothing of rows and tensors: the scales do.
        silent = "weight_block_size" not in self.config.model_fields_set
        if isinstance(asked, Blocks) and (not silent or scale == asked.scale_shape(shape)):
            return asked
        if shape[0] > 1 and scale in ((shape[0],), (shape[0], 1)):
            return Channel(0)
        return PerTensor() if prod(scale) == 1 else asked

    def _stored_shape(self, grouping: Grouping, shape: tuple[int, int]) -> tuple[int, ...]:
        found = grouping.scale_shape(shape)
        return (found[0], 1) if isinstance(grouping, Channel) else found

    def _why(self) -> str:
        size = self.config.weight_block_size
        return "the whole" if size is None else f"blocks of {size[0]} x {size[1]}"


class RowCodec(_Fp8Codec[FbgemmFp8Config]):
    """``fbgemm_fp8``: a scale per row."""

    scale_names: ClassVar[tuple[str, ...]] = ("weight_scale",)
    activation_names: ClassVar[tuple[str, ...]] = ("input_scale_ub",)
    suffixes: ClassVar[tuple[str, ...]] = ("weight", *scale_names, *activation_names)

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        seen = Conditions()
        made = fit_floats(
            form, values=(VALUES,), scales=(torch.float32,), grouping=Channel(0), seen=seen
        )
        return Fit(made, {}, tuple(seen.unless), tuple(seen.notes))

    def _grouping(self, scale: tuple[int, ...], shape: tuple[int, int]) -> Grouping:
        return Channel(0)

    def _stored_shape(self, grouping: Grouping, shape: tuple[int, int]) -> tuple[int, ...]:
        return (shape[0], 1)

    def _why(self) -> str:
        return "the rows"
