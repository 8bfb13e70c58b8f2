"""The protocol of forms.

A form is immutable, holds tensors (or, for nested scales, other forms), and defines what it
means: ``dequantize`` in plain torch, with a stated order and dtype of evaluation. Everything
else (kernels, codecs, linears) is proved against that. A form on the ``meta`` device has no data
but an exact size: plans are made of such forms.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from quantmill.forms.codes import Codes
from quantmill.forms.grouping import Grouping

if TYPE_CHECKING:
    from quantmill.kernels import KernelRegistry

__all__ = ["Form", "FormValue", "cut_value", "float_rows", "value_of"]


class Form(ABC):
    """A quantized tensor. Subclasses are frozen dataclasses."""

    kind: ClassVar[str]
    """Name of the kind, as kernels and codecs register for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Dtype of the tensor it stands for, given by ``dequantize`` by default."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float tensor ``[*shape]`` this form stands for: the definition."""

    @abstractmethod
    def traits(self) -> Mapping[str, Any]:
        """Facts that kernels' constraints refer to: ``bits``, ``grouping``, ``block``, ..."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` for ``x [..., in]``: the reference, in the dtype of ``x``."""
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``index`` (integers of any shape) of a matrix as floats ``[*index.shape, in]``:
        what an embedding looks up. Forms whose rows lie apart override it to read only those."""
        return self.dequantize(dtype)[index]

    def regular(self, kernels: KernelRegistry | None = None) -> Form:
        """The same values as one of the core's kinds, which kernels know; itself where there is
        none. For forms that hold a foreign layout until it is computed with. Where ``kernels`` has
        one that takes such a layout apart, it may be used: the result is the same."""
        return self

    def regular_facts(self) -> tuple[str, Mapping[str, Any]] | None:
        """Kind and traits of :meth:`regular` without making it; None where that is the form."""
        return None

    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Kind and traits to ask matmul kernels for, best first: the form's own, then those of
        :meth:`regular` where that is another form."""
        regular = self.regular_facts()
        own = (self.kind, self.traits())
        return [own] if regular is None else [own, regular]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same form with every tensor (nested ones too) replaced by ``function(tensor)``."""
        changes: dict[str, Any] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = function(value)
            elif isinstance(value, Codes):
                changes[item.name] = dataclasses.replace(value, data=function(value.data))
            elif isinstance(value, Form):
                changes[item.name] = value.map_tensors(function)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor of the form by its path, for example ``scale.codes``."""
        found: dict[str, Tensor] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            name = prefix + item.name
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, Codes):
                found[name] = value.data
            elif isinstance(value, Form):
                found.update(value.tensors(name + "."))
        return found

    def cut(self, first: int, last: int) -> Self | None:
        """Rows ``first`` to ``last`` of a matrix as a form of their own, sharing memory; None
        where they can't be cut out (codes or groups that cross rows)."""
        return None

    @property
    def nbytes(self) -> int:
        """Exact bytes in memory of all tensors of the form."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def to(self, device: str | torch.device) -> Self:
        """The same form on another device."""
        return self.map_tensors(lambda tensor: tensor.to(device))


FormValue = Tensor | Form
"""A scale or an offset: a tensor, or itself a form (double quantization, K-quants)."""


def value_of(value: FormValue) -> Tensor:
    """The float32 tensor of a scale or offset, dequantizing a nested form."""
    if isinstance(value, Form):
        return value.dequantize(torch.float32)
    return value.to(torch.float32)


def cut_value(
    value: FormValue, grouping: Grouping, shape: tuple[int, ...], first: int, last: int
) -> FormValue | None:
    """Scales or offsets of the rows ``first`` to ``last`` of a matrix, or None."""
    if not isinstance(value, Form):
        return grouping.cut(value, shape, first, last)
    # A nested form with a row per row is cut like a matrix; any other stays whole.
    if len(value.shape) == 2 and value.shape[0] == shape[0]:
        return value.cut(first, last)
    return grouping.cut(value.dequantize(torch.float32), shape, first, last)


def float_rows(form: Form, count: int) -> Iterator[tuple[int, Tensor]]:
    """``(first row, float32 rows)`` of a matrix, at most ``count`` at a time where its rows can be
    cut out; otherwise it is dequantized whole. The values are those of ``dequantize``."""
    total = form.shape[0]
    count = max(1, min(count, total))
    if len(form.shape) != 2 or form.cut(0, min(count, total)) is None:
        yield 0, form.dequantize(torch.float32)
        return
    for first in range(0, total, count):
        part = form.cut(first, min(total, first + count))
        assert part is not None
        yield first, part.dequantize(torch.float32)
