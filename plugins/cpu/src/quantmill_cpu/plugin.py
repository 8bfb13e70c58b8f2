"""Registrations of the native CPU kernels. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quantmill.hookspecs import hookimpl
from quantmill.registrations import Kernel
from quantmill_cpu.ggml_types import TYPES

QUANTMILL_API = 1

_AVAILABLE = "quantmill_cpu.native:unavailable"
_EVEN_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_BITS = (1, 2, 3, 4, 5, 6, 8)
_PACKINGS = ("u8", "i8", "hi4", "lo4", "dense")
_COLUMNS = (*range(16, 257, 16), 320, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Group sizes that the matmul is tested with: any multiple of 16 would do."""


def _matmuls(name: str, form: str, **constraints: tuple[Any, ...]) -> list[Kernel]:
    """The products of one weight and of many on the same layout, and the weight as floats."""
    one = Kernel(
        name=f"cpu-matmul-{name}",
        operation="matmul",
        form=form,
        implementation="quantmill_cpu.matmul:matmul",
        # In float32 the reference is asked for exactness, which 16-bit products do not have.
        dtypes=("bfloat16", "float16"),
        constraints=constraints,
        cost=0.02,
        available=_AVAILABLE,
        layout="cpu-panels",
        prepare="quantmill_cpu.matmul:prepare",
        restore="quantmill_cpu.matmul:restore",
        bind="quantmill_cpu.matmul:bind",
    )
    many = replace(
        one,
        name=f"cpu-grouped-{name}",
        operation="grouped_matmul",
        implementation="quantmill_cpu.matmul:grouped_matmul",
        prepare=None,
        restore=None,
        bind="quantmill_cpu.matmul:bind_grouped",
    )
    floats = replace(
        one,
        name=f"cpu-dequantize-{name}",
        operation="dequantize",
        implementation="quantmill_cpu.dequantize:dequantize",
        dtypes=("bfloat16", "float16", "float32"),
        bind=None,
    )
    return [one, many, floats]


_WITHOUT_FORM = ("Q8_K", "TQ1_0", *(name for name, item in TYPES.items() if item.points))
"""ggml's types that no form of the core stands for: panels can't be made of them."""


def _blocks(name: str, types: tuple[str, ...], *dtypes: str) -> Kernel:
    return Kernel(
        name=name,
        operation="matmul",
        form="ggml",
        implementation="quantmill_cpu.ggml_matmul:matmul",
        dtypes=dtypes,
        constraints={"table": types},
        cost=0.05,
        available=_AVAILABLE,
        bind="quantmill_cpu.ggml_matmul:bind",
    )


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
        Kernel(
            name="cpu-quantize-ggml",
            operation="quantize",
            form="ggml",
            implementation="quantmill_cpu.ggml:quantize",
            constraints={"table": tuple(name for name, item in TYPES.items() if item.made)},
            cost=0.02,
            available=_AVAILABLE,
        ),
        Kernel(
            name="cpu-dequantize-ggml",
            operation="dequantize",
            form="ggml",
            implementation="quantmill_cpu.ggml:dequantize",
            constraints={"table": tuple(TYPES)},
            cost=0.02,
            available=_AVAILABLE,
        ),
        Kernel(
            name="cpu-codes-ggml",
            operation="codes",
            form="ggml",
            implementation="quantmill_cpu.ggml:codes",
            constraints={"table": tuple(name for name, item in TYPES.items() if item.bits)},
            cost=0.1,
            available=_AVAILABLE,
        ),
        *(
            Kernel(
                name=f"cpu-{operation.replace('_', '-')}",
                operation=operation,
                form="tensor",
                implementation=f"quantmill_cpu.quantize:{operation}",
                cost=0.1,
                available=_AVAILABLE,
            )
            for operation in ("absmax", "extremes", "round_codes")
        ),
        Kernel(
            name="cpu-round",
            operation="round",
            form="tensor",
            implementation="quantmill_cpu.quantize:round_bytes",
            constraints={"values": ("int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2")},
            cost=0.1,
            available=_AVAILABLE,
        ),
        *(
            Kernel(
                name=f"cpu-{operation}",
                operation=operation,
                form="tensor",
                implementation=f"quantmill_cpu.{module}:{operation}",
                dtypes=("bfloat16",),
                cost=0.4,
                available="quantmill_cpu.calibrate:no_dots",
            )
            for operation, module in (("moments", "calibrate"), ("attention", "attention"))
        ),
        Kernel(
            name="cpu-linear",
            operation="linear",
            form="tensor",
            implementation="quantmill_cpu.linear:linear",
            dtypes=("bfloat16",),
            cost=0.5,
            max_rows=4,
            available="quantmill_cpu.calibrate:no_dots",
        ),
        *(
            Kernel(
                name=f"cpu-{operation}",
                operation=operation,
                form=form,
                implementation=f"quantmill_cpu.calibrate:{operation}",
                dtypes=("float32",),
                cost=cost,
                available=_AVAILABLE,
            )
            for operation, form, cost in (
                ("product", "tensor", 0.5),
                ("compensate", "affine", 0.1),
                ("descend", "affine", 0.1),
            )
        ),
        _blocks("cpu-matmul-ggml", tuple(TYPES), "float32"),
        _blocks("cpu-matmul-ggml-half", _WITHOUT_FORM, "bfloat16", "float16"),
        *_matmuls(
            "affine",
            "affine",
            bits=_BITS,
            packing=_PACKINGS,
            grouping=("group", "channel", "pertensor"),
            group_size=(None, *_COLUMNS),
            offset=("none", "zero", "minimum"),
        ),
        *_matmuls(
            "codebook",
            "codebook",
            bits=_BITS,
            packing=_PACKINGS,
            grouping=("flat", "group", "channel", "pertensor", "blocks"),
            group_size=(None, *_COLUMNS),
        ),
        *_matmuls(
            "float8",
            "scaled_float",
            values=("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
            grouping=("group", "channel", "pertensor", "blocks"),
        ),
    ]
