"""The form of types that the core has no form for: ggml's bytes as they lie in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantmill.forms import Form
from quantmill_gguf.types.sizes import BY_NAME

if TYPE_CHECKING:
    from quantmill.kernels import KernelRegistry

__all__ = ["RawForm"]


@dataclass(frozen=True, slots=True, eq=False)
class RawForm(Form):
    """Blocks of one type, decoded by :meth:`quantmill_gguf.types.base.BlockType.decode`."""

    kind: ClassVar[str] = "ggml"

    data: Tensor
    """uint8 ``[rows, row bytes]``, little-endian."""
    type_name: str
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        info = BY_NAME[self.type_name]
        return (*self.data.shape[:-1], self.data.shape[-1] // info.size * info.block)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        from quantmill_gguf.types import TYPES  # the types make this form

        return TYPES[self.type_name].decode(self.data).to(dtype or self.dtype)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        from quantmill_gguf.types import TYPES

        picked = self.data[index.reshape(-1)]
        values = TYPES[self.type_name].decode(picked).to(dtype or self.dtype)
        return values.reshape(*index.shape, self.shape[-1])

    def regular(self, kernels: KernelRegistry | None = None) -> Form:
        """See :class:`~quantmill.forms.Form`. A kernel of the operation ``codes`` is used where
        there is one: :data:`quantmill_gguf.types.base.Unpack`."""
        from quantmill_gguf.types import TYPES

        if self.data.is_meta:
            return _regular_shape(self.type_name, tuple(self.data.shape), self.dtype)
        choice = kernels and kernels.choose(
            "codes",
            self.kind,
            self.traits(),
            device=self.data.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        unpack = choice.load() if choice else None
        return TYPES[self.type_name].form(self.data, self.dtype, unpack)

    def regular_facts(self) -> tuple[str, Mapping[str, Any]] | None:
        return _regular_facts(self.type_name)

    @property
    def points(self) -> Tensor:
        """The lattice of an IQ1, IQ2 or IQ3 type, int8 ``[points, coordinates]``.

        Raises:
            ValueError: it is of a type without one.
        """
        from quantmill_gguf.types.grids import points
        from quantmill_gguf.types.lattice import LATTICES

        if self.type_name not in LATTICES:
            raise ValueError(f"{self.type_name} has no lattice")
        return points(LATTICES[self.type_name])

    def traits(self) -> Mapping[str, Any]:
        return {
            "table": self.type_name,
            "grouping": "group",
            "group_size": BY_NAME[self.type_name].block,
        }


@lru_cache(maxsize=1024)
def _regular_shape(type_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Form:
    """The core's form of blocks on the meta device: a plan asks for that of every block again."""
    from quantmill_gguf.types import TYPES

    return TYPES[type_name].form(torch.empty(shape, dtype=torch.uint8, device="meta"), dtype)


@cache
def _regular_facts(type_name: str) -> tuple[str, Mapping[str, Any]] | None:
    from quantmill_gguf.types import TYPES

    info = BY_NAME[type_name]
    form = TYPES[type_name].form(torch.zeros(1, info.size, dtype=torch.uint8))
    return None if isinstance(form, RawForm) else (form.kind, form.traits())
