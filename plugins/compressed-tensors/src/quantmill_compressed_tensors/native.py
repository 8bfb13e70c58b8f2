"""Checkpoints of 4-bit floats under their own ``quant_method``: ``mxfp4`` and ``nvfp4``.

They are read, computed with, dequantized and converted; compressed-tensors is what is written for
the same numbers, since its files are those that other programs read for any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from pydantic import Field

from quantmill.backend import Codec, Quantizer, WeightSource
from quantmill.checkpoint.headers import TensorHeader
from quantmill.checkpoint.reader import torch_dtype
from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Form
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule, Target
from quantmill_compressed_tensors.fp4 import (
    STYLES,
    StoredFp4,
    abstract_fp4,
    decode_fp4,
    encode_fp4,
    measure_fp4,
)
from quantmill_compressed_tensors.linear import CompressedLinear, CompressedLinearFactory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "Fp4Codec",
    "Fp4LinearFactory",
    "Mxfp4Codec",
    "Mxfp4Config",
    "NativeMxfp4Quantizer",
    "NativeNvfp4Quantizer",
    "Nvfp4Codec",
    "Nvfp4Config",
    "is_nvfp4",
    "rules",
]

READ_ONLY = declare("QM-CT-022", "A format is read and not made")
NO_PLACE = declare("QM-CT-023", "A form is none of 4-bit floats")


class Mxfp4Config(MethodConfig):
    """``mxfp4`` as transformers writes it for gpt-oss."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"dequantize"})

    modules_to_not_convert: list[str] | None = None
    """Modules that are float."""
    dequantize: bool = Field(False, exclude=True)
    """transformers' switch; here ``load(..., dequantize=True)`` does it."""

    def to_checkpoint(self) -> dict[str, Any]:
        return {"quant_method": "mxfp4", **super().to_checkpoint()}

    def summary(self) -> str:
        return "E2M1, 32 columns share a power of two"


class Nvfp4Config(MethodConfig):
    """NVFP4 as ModelOpt writes it."""

    modules_to_not_convert: list[str] | None = None
    """Modules that are float."""
    quant_algo: Literal["NVFP4"] = "NVFP4"
    ignore: list[str] | None = None
    """The same in ModelOpt's words: names, with ``*`` for anything."""
    producer: dict[str, Any] | None = None
    config_groups: dict[str, Any] | None = None

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        data = super().normalise(raw)
        inner = data.pop("quantization", None)  # hf_quant_config.json nests them
        if isinstance(inner, Mapping):
            data = {**inner, **data}
        names = data.pop("exclude_modules", None)
        if names is not None:
            data.setdefault("ignore", names)
        return data

    def to_checkpoint(self) -> dict[str, Any]:
        data = {key: value for key, value in super().to_checkpoint().items() if value is not None}
        return {"quant_method": "nvfp4", **data}

    def summary(self) -> str:
        return "E2M1, 16 columns share an E4M3 scale, all of them a float"


def is_nvfp4(raw: Mapping[str, Any]) -> bool:
    """Whether a config of ModelOpt (or without its name) is NVFP4's."""
    inner = raw.get("quantization")
    said = raw.get("quant_algo") or (
        inner.get("quant_algo") if isinstance(inner, Mapping) else None
    )
    return raw.get("quant_method") == "nvfp4" or said == "NVFP4"


def rules(config: Mxfp4Config | Nvfp4Config, origin: str) -> list[Rule]:
    """The skip lists as targeting rules."""
    found = from_transformers_skip(config.modules_to_not_convert or [], origin)
    if isinstance(config, Nvfp4Config):
        found += [
            Rule(name, "skip", origin, reason=f"ignore: {name}", optional=True)
            for name in config.ignore or []
        ]
    return found


class NativeMxfp4Quantizer(Quantizer[Any]):
    """Says what a stored weight is; makes none."""

    style: ClassVar[str] = "mxfp4"

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        group = STYLES[self.style].group
        columns = -(-target.in_features // group) * group
        return abstract_fp4((target.out_features, columns), self.style, dtype)

    def quantize(self, target: Target, weight: WeightSource) -> NoReturn:
        raise QuantmillError(
            READ_ONLY(
                target.name,
                f"{self.style} checkpoints are read and not made",
                f"make compressed-tensors: ct-{self.style}",
            )
        )


class NativeNvfp4Quantizer(NativeMxfp4Quantizer):
    """The same for NVFP4."""

    style: ClassVar[str] = "nvfp4"


class Fp4LinearFactory(CompressedLinearFactory):
    """Makes linears whose activations are as they come."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return CompressedLinear(form, bias, self.codec, self.kernels, self.dtype)


class Fp4Codec(Codec[Any]):
    """One style of storing 4-bit floats."""

    style: ClassVar[str]

    def encode(self, form: Form) -> dict[str, Tensor]:
        if not isinstance(form, StoredFp4) or form.style != self.style:
            raise QuantmillError(
                NO_PLACE(
                    "form",
                    f"a form of kind {form.kind} is not one of {self.style}",
                    "write compressed-tensors",
                )
            )
        return encode_fp4(form)

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        return decode_fp4(tensors, self.style, target, dtype)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        known = STYLES[self.style]
        codes, scale = headers.get(known.codes), headers.get(known.scale)
        if scale is None and (codes is None or codes.dtype not in ("U8", "I8")):
            return None
        seen = {
            name: (torch_dtype(item.dtype), tuple(item.shape)) for name, item in headers.items()
        }
        return measure_fp4(seen, self.style, target, dtype)


class Mxfp4Codec(Fp4Codec):
    """gpt-oss: blocks and scales."""

    style: ClassVar[str] = "mxfp4"
    suffixes: ClassVar[tuple[str, ...]] = STYLES["mxfp4"].names


class Nvfp4Codec(Fp4Codec):
    """ModelOpt."""

    style: ClassVar[str] = "nvfp4"
    suffixes: ClassVar[tuple[str, ...]] = STYLES["nvfp4"].names
