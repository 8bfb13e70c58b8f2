"""Stored blocks as forms: one uint8 tensor ``weight.TYPE`` ``[out, row bytes]`` per module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from quantmill.backend import Codec, Fit
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError
from quantmill.forms import Form
from quantmill.forms.convert import not_exact
from quantmill.forms.fit import Conditions, Zeros, fit_integers
from quantmill.targeting.types import Target
from quantmill_gguf import codes
from quantmill_gguf.config import GgufConfig
from quantmill_gguf.mixes import mix_named
from quantmill_gguf.types import TYPES, RawForm
from quantmill_gguf.types.sizes import BY_NAME, PLAIN

__all__ = ["GgufCodec", "type_of"]

T = TypeVar("T")
_PLAIN_TYPES: dict[str, tuple[int, Zeros, str]] = {
    "Q4_0": (4, "middle", "lo4"),
    "Q4_1": (4, "minimum", "lo4"),
    "Q5_0": (5, "middle", "dense"),
    "Q5_1": (5, "minimum", "dense"),
    "Q8_0": (8, "signed", "i8"),
}
"""Types that hold forms of other layouts, the smallest first: bits, zero points, packing."""
_PREFIX = "weight."
_FLOATS = ("F32", "F16", "BF16")


def type_of(form: Form) -> str:
    """Ggml's name of the type that a form was made of, or can be written as.

    Raises:
        QuantmillError: no type has such a form.
    """
    if isinstance(form, RawForm):
        return form.type_name
    known = _signature(form)
    for name in _types_by_signature().get(known, ()):
        if len(form.shape) == 2 and form.shape[1] % TYPES[name].info.block == 0:
            return name
    raise QuantmillError(
        codes.NO_BLOCKS("weight", f"no type of ggml has a form like {known!r:.200}", "convert it")
    )


def _signature(form: Form) -> tuple[object, ...]:
    """What tells the forms of two types apart: traits, and the kinds of scales and offsets."""
    facts: list[object] = [
        form.kind,
        *sorted((key, str(value)) for key, value in form.traits().items()),
    ]
    for name, tensor in sorted(form.tensors().items()):
        # A table's shape and a scale's dtype are the type's own; counts are the weight's.
        facts.append((name, str(tensor.dtype)))
    for name in ("scale", "offset"):
        inner = getattr(form, name, None)
        if isinstance(inner, Form):
            facts.append((name, *sorted((k, str(v)) for k, v in inner.traits().items())))
    return tuple(facts)


@cache
def _types_by_signature() -> dict[tuple[object, ...], list[str]]:
    """Names of the types whose forms look alike, in the order of the types."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, kind in TYPES.items():
        if name not in PLAIN:
            raw = torch.empty(1, kind.info.size, dtype=torch.uint8, device="meta")
            found.setdefault(_signature(kind.form(raw)), []).append(name)
    return found


class GgufCodec(Codec[GgufConfig]):
    """Every block type of ggml that can be decoded, and floats that were made of wider ones."""

    suffixes: ClassVar[tuple[str, ...]] = tuple(
        f"{_PREFIX}{name}" for name in BY_NAME if name not in PLAIN or name in _FLOATS
    )

    def encode(self, form: Form) -> dict[str, Tensor]:
        name = type_of(form)
        return {f"{_PREFIX}{name}": TYPES[name].raw(form)}

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        name, raw = _only(tensors, target)
        if raw.dtype != torch.uint8:
            raise _refuse(target, f"it is {raw.dtype}, not uint8")
        return self._form(name, raw, tuple(raw.shape), target, dtype)

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        asked = wanted.get("type")
        if asked is None and wanted.get("mix") is not None:
            asked = mix_named(wanted["mix"]).base
        try:
            own = type_of(form)
        except QuantmillError:
            own = None
        if own is not None and asked in (None, own):
            return Fit(form, {"type": own})
        causes: dict[str, list[str]] = {}
        for name, (bits, zeros, packing) in _PLAIN_TYPES.items():
            if asked not in (None, name):
                continue
            seen = Conditions()
            if target.in_features % BY_NAME[name].block:
                raise not_exact(target.name, f"its width {target.in_features} fills no blocks")
            try:
                made = fit_integers(
                    form,
                    bits=(bits,),
                    zeros=zeros,
                    scales=(torch.float16,),
                    size=BY_NAME[name].block,
                    packing=packing,
                    seen=seen,
                )
            except QuantmillError as error:
                causes.setdefault(error.findings[0].cause, []).append(name)
                continue
            return Fit(made, {"type": name}, tuple(seen.unless), tuple(seen.notes))
        told = "; ".join(f"{', '.join(names)}: {cause}" for cause, names in causes.items())
        raise not_exact(target.name, told or f"{asked} is made of floats only")

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if not any(name in self.suffixes for name in headers):
            return None
        name, header = _only(headers, target)
        shape = tuple(header.shape)
        meta = torch.empty(shape, dtype=torch.uint8, device="meta")
        return self._form(name, meta, shape, target, dtype)

    def _form(
        self, name: str, raw: Tensor, shape: tuple[int, ...], target: Target, dtype: torch.dtype
    ) -> Form:
        if name not in TYPES:
            raise QuantmillError(
                codes.UNSUPPORTED(
                    target.name,
                    f"it is {name}, whose decoder is not written yet",
                    "quantize the model to another type",
                )
            )
        info = BY_NAME[name]
        rows, columns = target.out_features, target.in_features
        if columns % info.block or shape != (rows, info.row_bytes(columns)):
            raise _refuse(
                target, f"{name} bytes {list(shape)} don't make the model's [{rows}, {columns}]"
            )
        # As it lies in the file: whoever wants one of the core's forms asks for it.
        return RawForm(raw, name, dtype)


def _only(members: Mapping[str, T], target: Target) -> tuple[str, T]:
    if len(members) != 1:
        raise _refuse(target, f"it is stored {len(members)} times: {', '.join(members)}")
    ((name, value),) = members.items()
    return name.removeprefix(_PREFIX), value


def _refuse(target: Target, cause: str) -> QuantmillError:
    return QuantmillError(codes.BAD_TENSOR(target.name, cause, "the file is damaged: get it again"))
