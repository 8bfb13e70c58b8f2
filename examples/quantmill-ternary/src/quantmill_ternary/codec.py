"""The layout on disk: two tensors for each linear, as the form holds them.

weight   uint8    [out, ceil(in / 5)]            five trits in a byte, base 3
scales   float32  [out, ceil(in / group_size)]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from quantmill.backend import Codec
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Form
from quantmill.targeting.types import Target
from torch import Tensor

from quantmill_ternary.config import TernaryConfig
from quantmill_ternary.form import TRITS, Ternary

__all__ = ["TernaryCodec", "empty_form"]

DAMAGED = declare("QM-TERNARY-001", "Stored ternary tensors contradict the config, or each other")
NO_TRITS = declare("QM-TERNARY-002", "Stored bytes are no ternary codes")


def empty_form(
    config: TernaryConfig, shape: tuple[int, int], dtype: torch.dtype, device: str | torch.device
) -> Ternary:
    """A form of the right sizes without values; on the meta device it takes no memory."""
    rows, columns = shape
    groups = -(-columns // config.group_size)
    return Ternary(
        torch.empty((rows, -(-columns // TRITS)), dtype=torch.uint8, device=device),
        torch.empty((rows, groups), dtype=torch.float32, device=device),
        config.group_size,
        shape,
        dtype,
    )


class TernaryCodec(Codec[TernaryConfig]):
    """Trits and scales of each linear."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight", "scales")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Ternary)
        return {"weight": form.packed, "scales": form.scale}

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        found = {name: (code_of(item.dtype), tuple(item.shape)) for name, item in tensors.items()}
        shape = (target.out_features, target.in_features)
        self._check(found, target, shape, dtype)
        packed = tensors["weight"]
        if not packed.is_meta and packed.numel() and int(packed.max()) >= 3**TRITS:
            cause = f"a byte of weight is {int(packed.max())}, and five trits make 242 at most"
            raise QuantmillError(NO_TRITS(target.name, cause, "get the checkpoint again"))
        return Ternary(packed, tensors["scales"], self.config.group_size, shape, dtype)

    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        if set(headers) == {"weight"} and headers["weight"].dtype != "U8":
            return None  # a float weight
        found = {name: (item.dtype, tuple(item.shape)) for name, item in headers.items()}
        shape = (target.out_features, target.in_features)
        narrow = shape[1] == 1
        if len(found) == 2 and found["weight"][1] == shape and not narrow:
            # Nobody knows the model, and the target is the packed tensor: bytes and groups say
            # how wide the weight can be.
            groups = (0, *found["scales"][1])[-1]
            shape = (shape[0], min(TRITS * shape[1], self.config.group_size * groups))
        return self._check(found, target, shape, dtype)

    def _check(
        self,
        found: Mapping[str, tuple[str, tuple[int, ...]]],
        target: Target,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Ternary:
        """The form on the meta device that ``found`` holds; anything else is a damaged file."""
        expected = empty_form(self.config, shape, dtype, "meta")
        for name, tensor in self.encode(expected).items():
            wanted: Any = (code_of(tensor.dtype), tuple(tensor.shape))
            if found.get(name) != wanted:
                there = "is missing"
                if name in found:
                    there = f"is {found[name][0]} {list(found[name][1])}"
                cause = f"{name} {there}, and has to be {wanted[0]} {list(wanted[1])}"
                fix = "get the checkpoint again, or correct group_size in its config.json"
                raise QuantmillError(DAMAGED(target.name, cause, fix))
        return expected
