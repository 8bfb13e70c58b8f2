"""The dtypes of safetensors: their width and their PyTorch counterpart.

Source: the safetensors format, https://github.com/huggingface/safetensors (``Dtype``). PyTorch is
imported only where a PyTorch dtype is asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from quantmill.checkpoint import codes
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BITS",
    "bytes_of",
    "code_of",
    "stored_shape",
    "torch_dtype",
    "torch_shape",
]

_TABLE: Final[tuple[tuple[str, int, str], ...]] = (
    # code, bits of an element, torch dtype
    ("BOOL", 8, "bool"),
    ("F4", 4, "float4_e2m1fn_x2"),
    ("F6_E2M3", 6, ""),
    ("F6_E3M2", 6, ""),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("I16", 16, "int16"),
    ("U16", 16, "uint16"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, "uint32"),
    ("F32", 32, "float32"),
    ("C64", 64, "complex64"),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, "uint64"),
)
BITS: Final[dict[str, int]] = {code: bits for code, bits, _ in _TABLE}
"""Bits of one element, by safetensors code. Elements narrower than a byte are packed."""
_TORCH: Final[dict[str, str]] = {code: name for code, _, name in _TABLE}
_CODES: Final[dict[str, str]] = {name: code for code, _, name in _TABLE if name}


def bytes_of(code: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a packed tensor, or None where its bits fill no whole number of bytes.

    Args:
        code: a safetensors dtype of :data:`BITS`.
        shape: extents in elements, each >= 0.
    """
    bits = math.prod(shape) * BITS[code]
    return bits // 8 if bits % 8 == 0 else None


def torch_dtype(code: str, where: str = "") -> torch.dtype:
    """The PyTorch dtype of a safetensors code.

    Raises:
        QuantmillError: ``QM-CKPT-033``, this PyTorch has no such dtype. ``where`` names the tensor.
    """
    import torch

    name = _TORCH.get(code, "")
    found = getattr(torch, name, None) if name else None
    if isinstance(found, torch.dtype):
        return found
    raise QuantmillError(
        codes.NO_TORCH_DTYPE(
            where,
            f"PyTorch {torch.__version__} has no dtype for safetensors' {code!r}",
            "use a newer PyTorch, or a plugin that reads this dtype's bytes",
        )
    )


def torch_shape(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the PyTorch tensor: F4 has two elements in one of ``float4_e2m1fn_x2``.

    Raises:
        QuantmillError: ``QM-CKPT-033``, the rows of an F4 tensor fill no whole number of bytes.
    """
    if code != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise QuantmillError(
            codes.NO_TORCH_DTYPE(
                "",
                f"PyTorch packs pairs of F4 into a byte, which the shape {list(shape)} does not",
                "use a plugin that reads this tensor's bytes",
            )
        )
    return (*shape[:-1], shape[-1] // 2)


def stored_shape(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of :func:`torch_shape`: the shape that a header states, in elements."""
    if code == "F4" and shape:
        return (*shape[:-1], shape[-1] * 2)
    return shape


def code_of(dtype: torch.dtype) -> str:
    """The safetensors code of a PyTorch dtype.

    Raises:
        ValueError: safetensors has no code for it (``complex128`` for example).
    """
    name = str(dtype).removeprefix("torch.")
    try:
        return _CODES[name]
    except KeyError:
        raise ValueError(f"safetensors has no dtype for {dtype}") from None
