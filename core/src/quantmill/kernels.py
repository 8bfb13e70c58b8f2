"""Kernels: implementations of operations on forms, and how one is chosen.

Signatures by operation (tensors are on the kernel's device; ``out`` tensors are written in place):

``quantize`` for ``codebook``, flat blocks
    ``fn(block, *, table, block_size, out_codes, out_scale)``: ``block`` float ``[n]`` contiguous;
    ``out_codes`` uint8 ``[ceil(n / 2)]`` for 4 bits (first code in the high nibble) or ``[n]`` for
    8; ``out_scale`` float32 ``[ceil(n / block_size)]``; ``table`` a registered table's name or,
    for 8 bits, a float32 tensor ``[256]``. Returns the flat index of the first non-finite value,
    or -1.
``quantize`` for ``affine``, row-wise int8
    ``fn(block, *, out_codes, out_scale)``: ``block`` float ``[rows, in]``; ``out_codes`` int8 of
    that shape; ``out_scale`` float32 ``[rows]`` (the absmax). Returns as above.
    On devices that compute asynchronously the index may be an int64 scalar tensor.
``quantize``, and ``codes``, for a plugin's own form
    As the plugin that has the form says.
``matmul``
    ``fn(x, form, bias)``, ``x`` float ``[..., in]``, result ``[..., out]`` in the dtype of ``x``.
    A kernel with a ``layout`` gets the :class:`Prepared` tensors in place of the form.
``grouped_matmul``
    ``fn(x, ends, weights, bias)``: many matrices of one shape, ``x`` float ``[rows, in]`` sorted by
    matrix, ``ends`` int64 ``[matrices]`` the row after each one's last; ``weights`` a
    :class:`Prepared` whose tensors are those of all matrices, stacked; ``bias`` ``[matrices, out]``
    or None. Result ``[rows, out]``; rows after the last end are zeros. A kernel of this operation
    prepares nothing: it reads a layout of ``matmul``. Its ``bind(weights) -> fn(x, ends, bias)``
    may be None for weights that it can't take together.
``activations``, for products in 8 bits
    ``fn(x, *, size, bound, rows)``: ``x`` float ``[tokens, in]``; blocks of ``size`` columns of a
    token share a scale, with None all of them do; no scale is chosen for more than ``bound``;
    ``rows`` of the result, those beyond the tokens are zeros. Returns the codes ``[rows, in]`` and
    float32 scales ``[rows, ceil(in / size)]``, of which the rows are neighbours in memory. The
    scale is the largest magnitude over the codes' largest number, and 1e-12 over it at least.
``absmax`` of the form ``tensor``
    ``fn(block, *, group)``: ``block`` float ``[rows, in]``; the largest magnitudes of groups of
    ``group`` columns, float32 ``[rows, ceil(in / group)]``, not finite where something there isn't.
``round`` of the form ``tensor``, to the dtype ``values``
    ``fn(block, *, by, out, group, multiply, top)``: ``block`` float ``[rows, in]`` and finite, over
    ``by`` (float32, shaped as above) or times it, held within ``top`` on both sides (int8: one
    further below) and rounded, half to even, into ``out``.
``extremes`` of the form ``tensor``
    ``fn(block, *, group)``: as ``absmax``, the least and the largest values; NaN in one of both
    where NaN is inside.
``round_codes`` of the form ``tensor``
    ``fn(block, *, by, minus, plus, out, group, multiply, bits, middle, edge, limits)``: packed
    codes of the same, as :meth:`quantmill.rounding.CodeRounding.store` says.
``linear`` of the form ``tensor``, for a few rows (``max_rows``)
    ``fn(x, weight, bias)``: as ``matmul``, with a float ``weight [out, in]``, contiguous, of the
    dtype of ``x``.
``moments`` of the form ``tensor``
    ``fn(x, *, out)``: add ``x.T @ x`` of ``x [tokens, columns]`` to float32 ``out [columns,
    columns]``, on and above its diagonal; what is below it has no meaning.
``product`` of the form ``tensor``
    ``fn(a, b)``: ``a.T @ b``, float32 ``[m, n]``, of float32 ``a [k, m]`` with any strides and
    contiguous ``b [k, n]``; the same bytes with any number of threads.
``attention`` of the form ``tensor``
    ``fn(q, k, v, *, scale, causal)``: ``softmax(scale * q @ k.T) @ v`` per head, ``q [batch, heads,
    queries, dim]`` with even ``dim``, ``k`` and ``v [batch, kv heads, keys, dim]``, of which runs
    of heads share one; elements of a row are neighbours in memory. With ``causal`` row i sees keys
    0 to i.
``compensate`` for ``affine``: round a panel of at most 128 columns one after the other
    ``fn(panel, local, groups, spans, scales, zeros, codes, *, top, symmetric, exponent)``: columns
    are rows of memory. ``panel`` float32 ``[n, out]`` holds the weight, then each column's error
    over its diagonal entry of ``local [n, n]``, the upper triangular factor of the inverse
    moments; errors go on to the columns after it, times ``local``. ``groups`` says which row of
    ``scales`` and ``zeros`` (float32 ``[groups, out]``) a column takes; where ``spans`` is not 0,
    that many columns from there on, as they are by then, choose theirs: the range of least
    ``sum |error| ** exponent`` of 24 from the full one down by 3%, with 0 the full one. ``codes``
    uint8 ``[n, out]`` from 0 to ``top`` are written.
``descend`` for ``affine``: choose codes again, each for the others as they are
    ``fn(panel, local, groups, spans, scales, zeros, steps, *, top)``: ``panel`` float32 ``[n,
    out]`` holds moments times what the rounded weight lacks, then what was added to each weight;
    ``local`` is the panel's square of the moments, ``steps`` float32 ``[n, out]`` are codes minus
    zero points, changed in place. Where ``spans`` is not 0 that many columns end a group, whose
    scale is chosen again for its codes (among those of float16, and above half of what it is).
``dequantize``
    ``fn(form, dtype)``, result ``[*form.shape]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantmill.devices import cuda_there
from quantmill.findings import QuantmillError, declare
from quantmill.registrations import Kernel, resolve
from quantmill.requirements import missing_requirements

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.forms import Form
    from quantmill.host import Host

__all__ = ["Choice", "KernelRegistry", "Prepared"]

UNKNOWN_KERNEL = declare("QM-KERNEL-002", "A forced kernel does not exist or does not fit")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A form in a kernel's live layout; the kernel's ``restore`` gives the form back, exactly."""

    kernel: Kernel
    skeleton: Form
    """The form on the meta device: shapes and structure without data."""
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, kernel: Kernel, form: Form) -> Prepared:
        """Prepare ``form`` for ``kernel``; on the meta device this only counts bytes."""
        assert kernel.prepare is not None
        return cls(kernel, form.to("meta"), resolve(kernel.prepare)(form))

    def restore(self) -> Form:
        """The form, bit for bit."""
        assert self.kernel.restore is not None
        form: Form = resolve(self.kernel.restore)(self.tensors, self.skeleton)
        return form

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel chosen for an operation, and why each other one was not."""

    kernel: Kernel
    reasons: Mapping[str, str]

    def load(self) -> Callable[..., Any]:
        """Import the implementation."""
        function: Callable[..., Any] = resolve(self.kernel.implementation)
        return function

    def bind(self, weight: Form | Prepared) -> Callable[..., Tensor]:
        """The kernel, a matmul, for one weight: ``fn(x, bias)``; ``fn(x, ends, bias)`` for a
        grouped one."""
        if self.kernel.bind is None:
            return _Call(self.load(), weight)
        function: Callable[..., Tensor] = resolve(self.kernel.bind)(weight)
        return function


@dataclass(frozen=True, slots=True)
class _Call:
    """A matmul and the weight for it; other than a closure it can be copied and pickled."""

    function: Callable[..., Tensor]
    weight: Form | Prepared

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        *first, bias = arguments
        return self.function(*first, self.weight, bias)


class KernelRegistry:
    """Chooses kernels by form, device, dtype and cost; options and environment override."""

    def __init__(
        self,
        kernels: Iterable[Kernel],
        *,
        force: Collection[str] = (),
        disable: Collection[str] = (),
        environment: bool = True,
    ) -> None:
        """``QUANTMILL_KERNELS`` and ``QUANTMILL_DISABLE_KERNELS`` (comma-separated names) add to
        ``force`` and ``disable``, unless ``environment`` is false."""
        self.kernels = sorted(kernels, key=lambda kernel: (kernel.cost, kernel.name))
        self.force = {*force, *(_environment("QUANTMILL_KERNELS") if environment else ())}
        self.disable = {
            *disable,
            *(_environment("QUANTMILL_DISABLE_KERNELS") if environment else ()),
        }
        unknown = (self.force | self.disable) - {kernel.name for kernel in self.kernels}
        if unknown:
            from quantmill.config import suggestion

            known = [kernel.name for kernel in self.kernels]
            raise QuantmillError(
                *(
                    UNKNOWN_KERNEL(
                        name,
                        f"there is no kernel {name!r}",
                        suggestion(name, known) or "see `quantmill kernels`",
                    )
                    for name in sorted(unknown)
                )
            )
        self._unavailable: dict[str, str | None] = {}

    @classmethod
    def of(cls, host: Host, **options: Any) -> KernelRegistry:
        """The registry of a host's kernels."""
        return cls(host.kernels, **options)

    def unavailable(self, kernel: Kernel) -> str | None:
        """Why a kernel can't run on this machine, or None."""
        if kernel.name not in self._unavailable:
            self._unavailable[kernel.name] = self._probe(kernel)
        return self._unavailable[kernel.name]

    @staticmethod
    def _probe(kernel: Kernel) -> str | None:
        for requirement, there in missing_requirements(kernel.requirements):
            if not requirement.optional:
                return f"needs {requirement.distribution}{requirement.versions} ({there})"
        if kernel.available is None:
            return None
        try:
            reason: str | None = resolve(kernel.available)()
        except Exception as error:  # noqa: BLE001 a kernel that can't be asked is one less, no more
            return f"asking whether it is available raised {type(error).__name__}: {error}"
        return reason

    def choose(
        self,
        operation: str,
        form: str,
        traits: Mapping[str, Any],
        *,
        device: str,
        dtype: str,
        rows: int | None = None,
        layout: str | None = None,
    ) -> Choice | None:
        """The cheapest kernel that fits, or None: then the form's reference is used.

        ``layout`` is that of tensors already prepared; without it kernels of any layout fit.
        """
        kernel, reasons = self.explain(
            operation, form, traits, device=device, dtype=dtype, rows=rows, layout=layout
        )
        return None if kernel is None else Choice(kernel, reasons)

    def explain(
        self,
        operation: str,
        form: str,
        traits: Mapping[str, Any],
        *,
        device: str,
        dtype: str,
        rows: int | None = None,
        layout: str | None = None,
    ) -> tuple[Kernel | None, dict[str, str]]:
        """What :meth:`choose` takes, and why each other kernel of the operation was not taken:
        the reasons are there also when none fits."""
        reasons: dict[str, str] = {}
        fitting = []
        for kernel in self.kernels:
            if kernel.operation != operation:
                continue
            if kernel.form != form:
                reasons[kernel.name] = f"is for the form {kernel.form}"
                continue
            reason = self._misfit(kernel, traits, device, dtype, rows)
            if reason is None and layout is not None and kernel.layout != layout:
                reason = f"reads the layout {kernel.layout!r}, the weight lies in {layout!r}"
            if reason is None:
                fitting.append(kernel)
            else:
                reasons[kernel.name] = reason
        if not fitting:
            return None, reasons
        chosen = next((kernel for kernel in fitting if kernel.name in self.force), fitting[0])
        for kernel in fitting:
            if kernel is not chosen:
                forced = chosen.name in self.force and kernel.name not in self.force
                reasons[kernel.name] = (
                    f"{chosen.name} is forced"
                    if forced
                    else f"costs {kernel.cost:g}, not less than {chosen.cost:g}"
                )
        return chosen, reasons

    def _misfit(
        self, kernel: Kernel, traits: Mapping[str, Any], device: str, dtype: str, rows: int | None
    ) -> str | None:
        if kernel.name in self.disable:
            return "disabled"
        if kernel.device != device.partition(":")[0]:
            return f"is for {kernel.device}"
        if dtype not in kernel.dtypes:
            return f"takes {', '.join(kernel.dtypes)}, not {dtype}"
        if rows is not None and kernel.max_rows is not None and rows > kernel.max_rows:
            return f"is for at most {kernel.max_rows} rows"
        for name, allowed in kernel.constraints.items():
            if traits.get(name) not in allowed:
                return f"needs {name} in {allowed}, here it is {traits.get(name)!r}"
        return self.unavailable(kernel) or _too_old(kernel, device)


def _too_old(kernel: Kernel, device: str) -> str | None:
    wanted = [item.compute_capability for item in kernel.requirements if item.compute_capability]
    if not wanted or kernel.device != "cuda":
        return None
    import torch

    if not cuda_there(device):
        return f"torch sees no {device} device here"
    have, least = torch.cuda.get_device_capability(device), max(wanted)
    if have >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]}, here it is {have[0]}.{have[1]}"


def _environment(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
