"""Loads the C library and checks its ABI version. Imports neither torch nor numpy.

The library picks the best instruction set it has code for; ``QUANTMILL_CPU_ISA`` (``baseline``,
``avx2`` or ``avx512``) asks for another one. Results are the same bytes with each.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

__all__ = [
    "ABI_VERSION",
    "level",
    "levels",
    "library",
    "matmul_level",
    "matmul_levels",
    "unavailable",
    "use_level",
    "use_matmul_level",
]

ABI_VERSION = 16
_FILE = Path(__file__).with_name("_native.so")
_VARIABLE = "QUANTMILL_CPU_ISA"


@cache
def library() -> ctypes.CDLL:
    """The library, with argument types declared. Calls release the interpreter lock.

    Raises:
        OSError: it was not built, or not for this machine, or not for this package's version;
            or ``QUANTMILL_CPU_ISA`` names an instruction set that this machine lacks.
    """
    if not _FILE.exists():
        raise OSError(f"{_FILE} does not exist: it is compiled when the package is installed")
    loaded = ctypes.CDLL(str(_FILE))
    try:
        version = loaded.qm_abi_version()
    except AttributeError:
        raise OSError(f"{_FILE} is not this package's library: install it again") from None
    if version != ABI_VERSION:
        raise OSError(
            f"{_FILE} has ABI {version}, this package wants {ABI_VERSION}: install it again"
        )
    pointer, size, small, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p
    signatures = {
        "qm_levels": (text, []),
        "qm_level": (text, []),
        "qm_use_level": (small, [text]),
        "qm_quantize_codebook4": (size, [pointer, small, size, size, *[pointer] * 4, small]),
        "qm_quantize_codebook8": (size, [pointer, size, size, *[pointer] * 3, small]),
        "qm_quantize_rows_int8": (size, [pointer, small, size, size, pointer, pointer, small]),
        "qm_absmax": (None, [pointer, small, *[size] * 3, pointer, small]),
        "qm_round": (
            None,
            [pointer, small, *[size] * 3, pointer, small, small, ctypes.c_float, pointer, small],
        ),
        "qm_extremes": (None, [pointer, small, *[size] * 3, pointer, pointer, small]),
        "qm_round_codes": (
            None,
            [
                *[pointer, small, *[size] * 3, *[pointer] * 3, small, small],
                *[ctypes.c_float] * 4,
                *[pointer, small],
            ],
        ),
        "qm_matmul": (small, [*[pointer] * 4, small, size, small]),
        "qm_matmul_grouped": (
            small,
            [pointer, size, size, *[pointer] * 4, small, size, small],
        ),
        "qm_dequantize": (small, [pointer, pointer, small, small]),
        "qm_weight_finish": (None, [pointer]),
        "qm_large_pages": (None, [pointer, size]),
        "qm_borrow_threads": (None, [pointer]),
        "qm_operators": (small, [pointer]),
        "qm_ggml_encode": (
            small,
            [small, pointer, small, size, size, *[pointer] * 3, small],
        ),
        "qm_ggml_decode": (small, [small, pointer, size, pointer, pointer, small]),
        "qm_ggml_codes": (small, [small, pointer, size, pointer, small]),
        "qm_ggml_matmul": (
            small,
            [small, pointer, size, size, pointer, pointer, size, pointer, pointer, small],
        ),
        "qm_moments": (small, [pointer, size, size, pointer, small]),
        "qm_linear": (small, [*[pointer] * 4, *[size] * 3, small]),
        "qm_attention": (small, [*[pointer] * 5, ctypes.c_float, small, small]),
        "qm_compensate": (
            small,
            [size, size, small, small, ctypes.c_float, *[pointer] * 7, small],
        ),
        "qm_descend": (small, [size, size, small, *[pointer] * 7, small]),
        "qm_product": (small, [*[size] * 3, pointer, size, size, pointer, pointer, small]),
        "qm_read": (size, [pointer, size, small]),
        "qm_matmul_levels": (text, []),
        "qm_matmul_level": (text, []),
        "qm_matmul_use_level": (small, [text]),
        "qm_panels_pack": (
            None,
            [pointer, small, small, size, size, pointer, small, pointer, small],
        ),
        "qm_panels_unpack": (None, [pointer, small, small, size, size, pointer, pointer, small]),
        "qm_panels_values": (None, [pointer, small, size, size, pointer, small]),
        "qm_codes_unpack": (None, [pointer, small, small, size, size, pointer]),
        "qm_codes_pack": (None, [pointer, small, small, size, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    wanted = os.environ.get(_VARIABLE)
    if wanted and loaded.qm_use_level(wanted.encode()) != 0:
        there = loaded.qm_levels().decode()
        raise OSError(f"{_VARIABLE}={wanted}, and this machine has: {there.replace(' ', ', ')}")
    return loaded


def levels() -> tuple[str, ...]:
    """Instruction sets that the library can use here, ascending."""
    return tuple(library().qm_levels().decode().split())


def level() -> str:
    """The instruction set in use."""
    name: str = library().qm_level().decode()
    return name


def use_level(name: str) -> None:
    """Use another instruction set from now on.

    Raises:
        ValueError: it is none of :func:`levels`.
    """
    if library().qm_use_level(name.encode()) != 0:
        raise ValueError(f"{name!r} is none of this machine's instruction sets {levels()}")


def matmul_levels() -> tuple[str, ...]:
    """Instruction sets that matmul can use here, ascending: those of :func:`levels` and newer
    ones (``avx512bf16``, ``amx``). The best one within :func:`level` is used by itself."""
    return tuple(library().qm_matmul_levels().decode().split())


def matmul_level() -> str:
    """The instruction set that matmul uses."""
    name: str = library().qm_matmul_level().decode()
    return name


def use_matmul_level(name: str) -> None:
    """Use another instruction set in matmul from now on; an empty name for the best one again.

    Raises:
        ValueError: it is none of :func:`matmul_levels`.
    """
    if library().qm_matmul_use_level(name.encode()) != 0:
        raise ValueError(f"{name!r} is none of matmul's instruction sets {matmul_levels()}")


def unavailable() -> str | None:
    """Why the library can't be used on this machine, or None."""
    try:
        library()
    except OSError as error:
        return f"the native library can't be used: {error}"
    return None
