"""Registrations of the native CPU kernels. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import Kernel

QUANTMILL_API = 1

_AVAILABLE = "quantmill_cpu.native:unavailable"
_EVEN_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@hookimpl
def quantmill_kernels() -> Sequence[Kernel]:
    return [
        Kernel(
            name="cpu-quantize-codebook4",
            operation="quantize",
            form="codebook",
            implementation="quantmill_cpu.quantize:quantize_codebook",
            constraints={"bits": (4,), "grouping": ("flat",), "group_size": _EVEN_BLOCKS},
            cost=0.02,
            available=_AVAILABLE,
        ),
        Kernel(
            name="cpu-quantize-codebook8",
            operation="quantize",
            form="codebook",
            implementation="quantmill_cpu.quantize:quantize_codebook",
            dtypes=("float32",),
            constraints={"bits": (8,), "grouping": ("flat",), "group_size": _EVEN_BLOCKS},
            cost=0.02,
            available=_AVAILABLE,
        ),
        Kernel(
            name="cpu-quantize-rows-int8",
            operation="quantize",
            form="affine",
            implementation="quantmill_cpu.quantize:quantize_rows_int8",
            constraints={
                "bits": (8,),
                "grouping": ("channel",),
                "offset": ("none",),
                "packing": ("i8",),
            },
            cost=0.02,
            available=_AVAILABLE,
        ),
    ]
