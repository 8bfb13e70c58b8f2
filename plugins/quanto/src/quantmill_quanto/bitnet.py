"""BitNet b1.58 checkpoints: ternary weights in Quanto's packing, read and computed with.

Relative to the module, for a weight ``[out, in]``::

    weight         uint8 [out / 4, in]   -1, 0 and 1 as 0, 1 and 2; cut into four slices of rows,
                                         the first in the lowest bits
    weight_scale   float [1]             w = code * scale (``autobitlinear``) or code / scale

Inputs are rounded to int8 per token, with the largest magnitude at 127. Source: arXiv 2402.17764,
and the files of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from quantmill.backend import Codec, Quantizer
from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Codes, Form, PerTensor
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.targeting.dialects import from_transformers_skip
from quantmill_quanto.codec import pack, unpack

if TYPE_CHECKING:
    from torch import nn

    from quantmill.backend import WeightSource
    from quantmill.checkpoint.headers import TensorHeader
    from quantmill.targeting.types import Rule, Target

__all__ = [
    "BitLinear",
    "BitLinearFactory",
    "BitnetCodec",
    "BitnetConfig",
    "BitnetQuantizer",
    "Ternary",
    "rules",
]

BAD_TERNARY = declare("QM-QUANTO-020", "The tensors of a ternary weight contradict each other")
NOT_MADE = declare("QM-QUANTO-021", "BitNet checkpoints come from training")
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class BitnetConfig(MethodConfig):
    """What a BitNet checkpoint says, with the fields of transformers' ``BitNetQuantConfig``."""

    modules_to_not_convert: list[str] | None = None
    """Modules that are float."""
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    """Whether the stored scale divides or multiplies."""
    quantization_mode: Literal["offline"] = "offline"
    """Weights that are quantized in each forward pass (``online``) are a float checkpoint."""
    use_rms_norm: Literal[False] = False
    """A norm within each linear is not computed here."""
    rms_norm_eps: float | None = 1e-6

    def to_checkpoint(self) -> dict[str, Any]:
        data = {key: value for key, value in super().to_checkpoint().items() if value is not None}
        return {"quant_method": "bitnet", **data}

    def summary(self) -> str:
        return "ternary, one scale, int8 activations"


def rules(config: BitnetConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules."""
    return from_transformers_skip(config.modules_to_not_convert or [], origin)


@dataclass(frozen=True, slots=True, eq=False)
class Ternary(Affine):
    """Codes of 2 bits around 1, with the scale as it is stored."""

    stored: Tensor | None = None


def _abstract(shape: tuple[int, int], scale: torch.dtype, dtype: torch.dtype) -> Ternary:
    meta = torch.device("meta")
    return Ternary(
        Codes.empty(shape, 2, "dense", meta),
        torch.empty((), dtype=torch.float32, device=meta),
        PerTensor(),
        torch.empty((), dtype=torch.float32, device=meta),
        "zero",
        dtype=dtype,
        stored=torch.empty(1, dtype=scale, device=meta),
    )


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(
        BAD_TERNARY(target.name, cause, "the checkpoint is damaged: get it again")
    )


class BitnetCodec(Codec[BitnetConfig]):
    """Packed ternary rows and a scale."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Ternary) and form.stored is not None
        rows, columns = form.shape
        if form.stored.is_meta:
            packed = torch.empty(-(-rows // 4), columns, dtype=torch.uint8, device="meta")
        else:
            packed = pack(form.codes.unpack(), 2)
        return {"weight": packed, "weight_scale": form.stored}

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        missing = [name for name in self.suffixes if name not in tensors]
        if missing:
            raise _refuse(target, f"{' and '.join(missing)} are missing")
        packed, stored = tensors["weight"], tensors["weight_scale"]
        self._fits(str(packed.dtype), tuple(packed.shape), tuple(stored.shape), target)
        if stored.dtype not in _FLOATS.values():
            raise _refuse(target, f"weight_scale is {stored.dtype}")
        scale = stored.to(torch.float32).reshape(())
        if not 0 < float(scale) < float("inf"):
            raise _refuse(target, f"weight_scale is {float(scale)}, not finite and positive")
        shape = (target.out_features, target.in_features)
        codes = unpack(packed, 2, shape[0])
        if bool((codes == 3).any()):
            raise _refuse(target, "weight holds the code 3, and a ternary weight has 0 to 2")
        if self.config.linear_class == "bitlinear":
            scale = scale.reciprocal()
        return replace(
            _abstract(shape, stored.dtype, dtype),
            codes=Codes.pack(codes, 2, "dense"),
            scale=scale,
            offset=torch.ones_like(scale),
            stored=stored,
        )

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        weight, scale = headers.get("weight"), headers.get("weight_scale")
        if scale is None and (weight is None or weight.dtype != "U8"):
            return None
        if weight is None or scale is None:
            raise _refuse(target, f"it has {', '.join(sorted(headers))} only")
        kind = "torch.uint8" if weight.dtype == "U8" else weight.dtype
        self._fits(kind, tuple(weight.shape), tuple(scale.shape), target)
        if scale.dtype not in _FLOATS:
            raise _refuse(target, f"weight_scale is {scale.dtype}")
        return _abstract((target.out_features, target.in_features), _FLOATS[scale.dtype], dtype)

    @staticmethod
    def _fits(kind: str, packed: tuple[int, ...], scale: tuple[int, ...], target: Target) -> None:
        wanted = (-(-target.out_features // 4), target.in_features)
        if kind != "torch.uint8" or packed != wanted or scale not in ((), (1,)):
            raise _refuse(
                target,
                f"weight is {kind} {list(packed)} and weight_scale {list(scale)}, a weight"
                f" {[target.out_features, target.in_features]} has uint8 {list(wanted)} and [1]",
            )


class BitnetQuantizer(Quantizer[BitnetConfig]):
    """Says what a stored weight is; makes none."""

    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        kind = dtype if dtype in _FLOATS.values() else torch.float32
        return _abstract((target.out_features, target.in_features), kind, dtype)

    def quantize(self, target: Target, weight: WeightSource) -> NoReturn:
        raise QuantmillError(
            NOT_MADE(target.name, "ternary weights are trained, not rounded", "take another method")
        )


class BitLinear(FormLinear):
    """A ternary linear whose inputs are rounded to int8, each token by itself."""

    def _hold(self, form: Form) -> None:
        assert isinstance(form, Ternary)
        self._stored = form.stored
        super()._hold(replace(form, stored=None))

    def whole(self, form: Form) -> Form:
        """The form with the codes as they were stored."""
        assert isinstance(form, Ternary)
        return replace(form, stored=self._stored)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = _Rounded.apply(x)
        # Whole numbers up to 127 are exact in 16 bits, and a row's scale comes out of its sum.
        result = (self.product(codes) * scale).to(x.dtype)
        return result if self.bias is None else result + self.bias.to(x.dtype)


class _Rounded(torch.autograd.Function):
    """Codes and scales of inputs; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        work = x.to(torch.float32)
        if x.numel():
            scale = work.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
        else:
            scale = work.new_ones(*x.shape[:-1], 1)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale)
        return torch.round(work / scale).clamp(-128, 127).to(x.dtype), scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return (grads[0] / scale).to(grads[0].dtype)


class BitLinearFactory(FormLinearFactory):
    """Makes :class:`BitLinear` modules."""

    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        return BitLinear(form, bias, self.codec, self.kernels, self.dtype)

    def resident_bytes(self, form: Form) -> int:
        assert isinstance(form, Ternary) and form.stored is not None
        return super().resident_bytes(replace(form, stored=None)) + form.stored.nbytes
