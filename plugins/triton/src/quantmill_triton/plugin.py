"""Registrations of the Triton kernels. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantmill.hookspecs import hookimpl
from quantmill.registrations import Kernel, Requirement

QUANTMILL_API = 1

_GROUPS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_PACKINGS = ("u8", "hi4", "lo4", "dense")
_AMPERE, _ADA = (8, 0), (8, 9)


def _family(
    name: str, form: str, constraints: Mapping[str, tuple[Any, ...]], capability: tuple[int, int]
) -> list[Kernel]:
    """The kernels of all operations for one family of forms, on the same live layout."""
    made = [
        Kernel(
            name=f"triton-{operation}-{name}",
            operation=operation,
            form=form,
            implementation=f"quantmill_triton.{operation}:{operation}",
            device="cuda",
            constraints=constraints,
            cost=0.1,
            requirements=(
                Requirement(
                    "triton", ">=3.5", "compiles the kernels", compute_capability=capability
                ),
            ),
            available="quantmill_triton.available:unavailable",
            layout="triton",
            prepare="quantmill_triton.layout:prepare",
            restore="quantmill_triton.layout:restore",
            bind="quantmill_triton.matmul:bind" if operation == "matmul" else None,
        )
        for operation in ("matmul", "dequantize")
    ]
    many = replace(
        made[0],
        name=f"triton-grouped-{name}",
        operation="grouped_matmul",
        implementation="quantmill_triton.matmul:grouped_matmul",
        dtypes=("bfloat16", "float16"),
        prepare=None,
        restore=None,
        bind="quantmill_triton.matmul:bind_grouped",
    )
    return [*made, many]


@hookimpl
def quantmill_kernels() -> Sequence[Kernel]:
    grouped = {"grouping": ("group",), "group_size": _GROUPS}
    whole = {"grouping": ("channel", "pertensor")}
    blocks = {"grouping": ("group", "flat"), "group_size": _GROUPS}
    tables = {"bits": (4, 8), "packing": _PACKINGS}
    unsigned = {"bits": (2, 3, 4, 5, 6, 8), "packing": _PACKINGS}
    signed = {"bits": (8,), "packing": ("i8",)}
    fp8 = {"values": ("float8_e4m3fn", "float8_e5m2")}
    return [
        *_family("affine-group", "affine", {**unsigned, **grouped}, _AMPERE),
        *_family("affine-row", "affine", {**unsigned, **whole, "act_order": (False,)}, _AMPERE),
        *_family("int8-group", "affine", {**signed, **grouped}, _AMPERE),
        *_family("int8-row", "affine", {**signed, **whole, "act_order": (False,)}, _AMPERE),
        *_family("codebook", "codebook", {**tables, **blocks}, _AMPERE),
        *_family("codebook-row", "codebook", {**tables, **whole}, _AMPERE),
        *_family(
            "fp8-group",
            "scaled_float",
            {**fp8, "grouping": ("group",), "group_size": tuple((size,) for size in _GROUPS)},
            _ADA,
        ),
        *_family(
            "fp8-blocks",
            "scaled_float",
            {
                **fp8,
                "grouping": ("blocks",),
                "group_size": tuple((a, b) for a in (1, *_GROUPS) for b in _GROUPS),
            },
            _ADA,
        ),
        *_family("fp8-row", "scaled_float", {**fp8, **whole}, _ADA),
        Kernel(
            name="triton-activations-fp8",
            operation="activations",
            form="scaled_float",
            implementation="quantmill_triton.activations:activations",
            device="cuda",
            constraints={
                "values": ("float8_e4m3fn",),
                "group_size": (None, *((size,) for size in _GROUPS[1:-1])),
            },
            cost=0.1,
            requirements=(
                Requirement("triton", ">=3.5", "compiles the kernels", compute_capability=_ADA),
            ),
            available="quantmill_triton.available:unavailable",
        ),
    ]
