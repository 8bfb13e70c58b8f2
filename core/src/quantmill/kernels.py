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
``matmul``
    ``fn(x, form, bias)``, ``x`` float ``[..., in]``, result ``[..., out]`` in the dtype of ``x``.
``dequantize``
    ``fn(form, dtype)``, result ``[*form.shape]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantmill.findings import QuantmillError, declare
from quantmill.host import missing_requirements
from quantmill.registrations import Kernel, resolve

if TYPE_CHECKING:
    from quantmill.host import Host

__all__ = ["Choice", "KernelRegistry"]

NO_KERNEL = declare("QM-KERNEL-001", "No kernel can run an operation here")
UNKNOWN_KERNEL = declare("QM-KERNEL-002", "A forced kernel does not exist or does not fit")


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel chosen for an operation, and why each other one was not."""

    kernel: Kernel
    reasons: Mapping[str, str]

    def load(self) -> Callable[..., Any]:
        """Import the implementation."""
        function: Callable[..., Any] = resolve(self.kernel.implementation)
        return function


class KernelRegistry:
    """Chooses kernels by form, device, dtype and cost; options and environment override."""

    def __init__(
        self,
        kernels: Iterable[Kernel],
        *,
        force: Collection[str] = (),
        disable: Collection[str] = (),
    ) -> None:
        """``QUANTMILL_KERNELS`` and ``QUANTMILL_DISABLE_KERNELS`` (comma-separated names) add to
        ``force`` and ``disable``."""
        self.kernels = sorted(kernels, key=lambda kernel: (kernel.cost, kernel.name))
        self.force = {*force, *_environment("QUANTMILL_KERNELS")}
        self.disable = {*disable, *_environment("QUANTMILL_DISABLE_KERNELS")}
        unknown = (self.force | self.disable) - {kernel.name for kernel in self.kernels}
        if unknown:
            raise QuantmillError(
                *(
                    UNKNOWN_KERNEL(name, f"there is no kernel {name!r}", "see `quantmill doctor`")
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
        unmet = missing_requirements(kernel.requirements)
        if unmet:
            requirement, there = unmet[0]
            return f"needs {requirement.distribution}{requirement.versions} ({there})"
        if kernel.available is None:
            return None
        reason: str | None = resolve(kernel.available)()
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
    ) -> Choice | None:
        """The cheapest kernel that fits, or None: then the form's reference is used."""
        reasons: dict[str, str] = {}
        fitting = []
        for kernel in self.kernels:
            if kernel.operation != operation or kernel.form != form:
                continue
            reason = self._misfit(kernel, traits, device, dtype, rows)
            if reason is None:
                fitting.append(kernel)
            else:
                reasons[kernel.name] = reason
        forced = [kernel for kernel in fitting if kernel.name in self.force]
        if forced:
            fitting = forced
        if not fitting:
            return None
        for kernel in fitting[1:]:
            reasons[kernel.name] = f"costs {kernel.cost:g}, more than {fitting[0].cost:g}"
        return Choice(fitting[0], reasons)

    def _misfit(
        self, kernel: Kernel, traits: Mapping[str, Any], device: str, dtype: str, rows: int | None
    ) -> str | None:
        if kernel.name in self.disable:
            return "disabled"
        if kernel.device != device:
            return f"is for {kernel.device}"
        if dtype not in kernel.dtypes:
            return f"takes {', '.join(kernel.dtypes)}, not {dtype}"
        if rows is not None and kernel.max_rows is not None and rows > kernel.max_rows:
            return f"is for at most {kernel.max_rows} rows"
        for name, allowed in kernel.constraints.items():
            if traits.get(name) not in allowed:
                return f"needs {name} in {allowed}, here it is {traits.get(name)!r}"
        return self.unavailable(kernel)


def _environment(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
