"""Embeddings held as forms: a lookup dequantizes the rows it wants, and nothing else.

:func:`embedding_of` puts a form in the place of any ``nn.Embedding``, subclasses included: what
they add to the lookup (Gemma's scaling) stays in force. ``weight`` is there as well, as a tensor
that becomes float where a value of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantmill.backend import Codec
from quantmill.forms import Form

__all__ = ["FormEmbedding", "FormWeight", "embedding_of", "float_embedding"]

_FACTS: Final = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.element_size,
        Tensor.is_floating_point,
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta"),
                *("is_cuda", "is_cpu", "itemsize", "is_sparse", "is_quantized", "grad_fn"),
            )
            if hasattr(getattr(Tensor, name, None), "__get__")
        ),
    }
)
"""What can be asked of a weight without making it."""


class FormWeight(Tensor):
    """The float weight of a module that holds a form. Shape, dtype and device cost nothing; any
    computation dequantizes it."""

    _make: Callable[[], Form]

    @staticmethod
    def __new__(cls, form: Form, dtype: torch.dtype) -> FormWeight:
        device = next(iter(form.tensors().values())).device
        return cls.of(lambda: form, form.shape, device, dtype)

    @classmethod
    def of(
        cls,
        make: Callable[[], Form],
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> FormWeight:
        """The weight of a form that is itself made where it is needed."""
        like = torch.empty(1, dtype=dtype, device=device).expand(tuple(shape))
        made: FormWeight = Tensor._make_subclass(cls, like)
        made._make = make
        return made

    @property
    def form(self) -> Form:
        """What it is made of."""
        return self._make()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

        def float_of(item: Any) -> Any:
            if not isinstance(item, FormWeight):
                return item
            return item.form.dequantize(item.dtype)

        args, kwargs = tree_map(float_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FormWeight:
        import copy

        return FormWeight(copy.deepcopy(self.form, memo), self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FormWeight({list(self.shape)}, {self.dtype}, {self.form.kind})"


class FormEmbedding(nn.Embedding):
    """``y = W[ids]`` with ``W`` held as a form ``[rows, width]``."""

    form: Form
    stored: bool
    """Its tensors are in the ``state_dict``; a tied one's are its owner's."""

    def __init__(
        self,
        form: Form,
        codec: Codec[Any],
        dtype: torch.dtype,
        *,
        padding_idx: int | None = None,
        stored: bool = True,
    ) -> None:
        """``dtype`` is that of the rows looked up."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = form.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._fill(form, codec, dtype, stored)

    def _fill(self, form: Form, codec: Codec[Any], dtype: torch.dtype, stored: bool) -> None:
        self.form, self._codec, self._dtype, self.stored = form, codec, dtype, stored
        self._weight: FormWeight | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight, made where a value of it is used."""
        if torch.compiler.is_compiling():
            return self.form.dequantize(self._dtype)  # What nobody uses, a compiler drops.
        if self._weight is None:
            self._weight = FormWeight(self.form, self._dtype)
        return self._weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 torch's name
        return self.form.rows(input, self._dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> FormEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe: Tensor = fn(torch.empty(0, dtype=self._dtype))
        self._dtype = probe.dtype

        def move(tensor: Tensor) -> Tensor:
            # Codes and scales follow a change of device and never one of dtype.
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.form, self._weight = self.form.map_tensors(move), None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._non_persistent_buffers_set:
                destination[prefix + name] = buffer
        if self.stored:
            for name, tensor in self._codec.encode(self.form).items():
                destination[prefix + name] = tensor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, form={self.form.kind}"


def embedding_of(
    module: nn.Embedding, form: Form, codec: Codec[Any], dtype: torch.dtype, *, stored: bool = True
) -> FormEmbedding:
    """What takes the place of ``module``, with all that its class adds to a lookup."""
    cls = type(module)
    if cls is nn.Embedding:
        return FormEmbedding(form, codec, dtype, padding_idx=module.padding_idx, stored=stored)
    # The subclass before ours: its super().forward is our lookup.
    made: Any = _copied(module, type(f"Form{cls.__name__}", (cls, FormEmbedding), {}))
    made._fill(form, codec, dtype, stored)
    made_embedding: FormEmbedding = made
    return made_embedding


def float_embedding(module: FormEmbedding, weight: nn.Parameter) -> nn.Embedding:
    """The inverse of :func:`embedding_of`: the class that was there, with a float weight."""
    cls = nn.Embedding if type(module) is FormEmbedding else type(module).__bases__[0]
    made: Any = _copied(module, cls)
    for name in ("form", "_codec", "_dtype", "stored", "_weight"):
        vars(made).pop(name)
    made.register_parameter("weight", weight)
    embedding: nn.Embedding = made
    return embedding


def _copied(module: nn.Embedding, cls: type[nn.Module]) -> nn.Module:
    """A module of another class with all that ``module`` has, but for its weight."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    for name, value in vars(module).items():
        if name == "_parameters":
            made._parameters.update({k: v for k, v in value.items() if k != "weight"})
        elif name in ("_buffers", "_modules"):
            vars(made)[name].update(value)
        else:
            vars(made)[name] = value
    return made
