"""The disk layout: a form to and from the tensors of a checkpoint, bit for bit.

Relative to the module::

    weight   uint8    4 bits: [ceil(out * in / 2), 1], the first code of a byte in its low half
                      8 bits: [out, in]
    scales   float32  [out, ceil(in / group_size)]
    zeros    uint8    as scales

A weight is ``(code - zero) * scale``. These are the tensors in memory as they are, so loading
copies nothing. If yours differ (transposed, packed otherwise), convert here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from quantmill.backend import Codec
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Affine, Codes, Form, Group
from quantmill.targeting.types import Target
from torch import Tensor

from quantmill_example.config import ExampleConfig

__all__ = ["ExampleCodec", "empty_form"]

# An area of your own keeps the codes of findings apart from those of other packages.
DAMAGED = declare("QM-EXAMPLE-001", "A quantized weight's tensors are missing or contradictory")


def empty_form(
    config: ExampleConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Affine:
    """A form without values yet; on the ``meta`` device without memory too.

    quantmill knows forms ``Affine`` (an even grid), ``Codebook`` (a table) and ``ScaledFloat``
    (FP8 and its like). Most methods are one of them. If yours is none, subclass
    ``quantmill.forms.Form`` and define ``dequantize``: everything else works the same.
    """
    grouping = Group(config.group_size)
    groups = grouping.scale_shape(shape)
    return Affine(
        Codes.empty(shape, config.bits, "lo4" if config.bits == 4 else "u8", device),
        torch.empty(groups, dtype=torch.float32, device=device),
        grouping,
        offset=torch.empty(groups, dtype=torch.uint8, device=device),
        offset_kind="zero",
        dtype=dtype,
    )


class ExampleCodec(Codec[ExampleConfig]):
    """Three tensors for each linear."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight", "scales", "zeros")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine)
        assert isinstance(form.scale, Tensor) and isinstance(form.offset, Tensor)
        return {"weight": form.codes.data, "scales": form.scale, "zeros": form.offset}

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        shape = (target.out_features, target.in_features)
        found = {name: (code_of(item.dtype), tuple(item.shape)) for name, item in tensors.items()}
        empty = self._checked(found, target, shape, dtype)
        return Affine(
            Codes(tensors["weight"], empty.codes.bits, shape, empty.codes.packing),
            tensors["scales"],
            empty.grouping,
            offset=tensors["zeros"],
            offset_kind="zero",
            dtype=dtype,
        )

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if set(headers) == {"weight"} and headers["weight"].dtype != "U8":
            return None  # a float weight
        found = {name: (item.dtype, tuple(item.shape)) for name, item in headers.items()}
        shape = (target.out_features, target.in_features)
        if self.config.bits == 4 and len(found) == 3 and found["weight"][1] == shape != (1, 1):
            # No framework is installed that knows the model, and the target is the packed tensor:
            # the scales tell the number of rows then.
            rows = found["scales"][1][0]
            shape = (rows, 2 * headers["weight"].numel // max(1, rows))
        return self._checked(found, target, shape, dtype)

    def _checked(
        self,
        found: Mapping[str, tuple[str, tuple[int, ...]]],
        target: Target,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Affine:
        """The form on the meta device that ``found`` holds; anything else is a damaged file.

        Believe nothing of a file: what passes here unchecked is a traceback, or wrong output,
        on somebody's machine.
        """
        expected = empty_form(self.config, shape, dtype, "meta")
        for name, tensor in self.encode(expected).items():
            wanted = (code_of(tensor.dtype), tuple(tensor.shape))
            if found.get(name) != wanted:
                there = f"is {_words(*found[name])}" if name in found else "is missing"
                cause = f"{name} {there}, and has to be {_words(*wanted)}"
                fix = "get the checkpoint again, or correct bits and group_size in its config.json"
                raise QuantmillError(DAMAGED(target.name, cause, fix))
        return expected


def _words(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
