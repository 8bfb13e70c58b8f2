"""Loads the C library and checks its ABI version. Imports neither torch nor numpy."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = ["ABI_VERSION", "library", "unavailable"]

ABI_VERSION = 1
_FILE = Path(__file__).with_name("_native.so")


@cache
def library() -> ctypes.CDLL:
    """The library, with argument types declared. Calls release the interpreter lock.

    Raises:
        OSError: it was not built, or not for this machine.
    """
    loaded = ctypes.CDLL(str(_FILE))
    version = loaded.qm_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"the library has ABI {version}, this package wants {ABI_VERSION}")
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        "qm_quantize_codebook4": [pointer, small, size, size, *[pointer] * 4, small],
        "qm_quantize_codebook8": [pointer, size, size, *[pointer] * 3, small],
        "qm_quantize_rows_int8": [pointer, small, size, size, pointer, pointer, small],
    }
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, size
    return loaded


def unavailable() -> str | None:
    """Why the library can't be used on this machine, or None."""
    try:
        library()
    except OSError as error:
        return f"the native library can't be loaded: {error}"
    return None
