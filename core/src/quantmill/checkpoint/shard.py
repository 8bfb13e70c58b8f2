"""One safetensors file while it grows: its data lies behind room for the header, which is last."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quantmill.checkpoint import codes
from quantmill.checkpoint.dtypes import code_of
from quantmill.findings import QuantmillError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "Shard", "bug", "stored_dtype"]

FORMAT: Final = {"format": "pt"}
"""The ``__metadata__`` that readers of PyTorch's tensors look for."""
_LONGEST_NAME: Final = 1 << 16
"""Bytes of a tensor's name in a header; with its shape it fits into an empty header."""
_ALIGNED: Final = 64
_SMALL: Final = 1 << 16
"""Shorter tensors of no multiple of ``_ALIGNED`` bytes wait for the end of their shard."""
_GROWTH: Final = 32
"""Bytes by which an entry grows when its offsets do."""


def _opening(metadata: Mapping[str, str]) -> str:
    return '{"__metadata__":' + json.dumps(metadata, separators=(",", ":"))


class Shard:
    """One safetensors file while it grows."""

    def __init__(self, path: Path, reserved: int, about: int) -> None:
        """``reserved`` bytes are kept for the header, ``about`` of them for its metadata."""
        self.path = path
        self._file = path.open("wb")
        self._reserved = reserved
        self._file.truncate(reserved)
        self._file.seek(reserved)
        self._entries: list[str] = []
        self._odd: list[tuple[int, str, str, tuple[int, ...], bytes]] = []
        self._odd_bytes = 0
        self._header_bytes = len(_opening(FORMAT)) + 1 + about
        self.data_bytes = 0

    def _entry(self, name: str, dtype: str, shape: tuple[int, ...], size: int) -> str:
        entry = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [self.data_bytes, self.data_bytes + size],
        }
        # ASCII: a length in characters is one in bytes.
        return f",{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}"

    def full(self, name: str, dtype: str, shape: tuple[int, ...], size: int, limit: int) -> bool:
        """Whether a tensor should go into the next shard."""
        if not self._entries and not self._odd:
            return False
        header = self._header_bytes + len(self._entry(name, dtype, shape, size))
        held = self.data_bytes + self._odd_bytes
        return held + size > limit or header + _GROWTH > self._reserved - 8

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Tensor, size: int) -> None:
        """Take a contiguous tensor on the CPU, of ``size`` bytes."""
        if size % _ALIGNED and size < _SMALL:
            # Written last, so that they don't misalign what can be mapped.
            memory = (ctypes.c_char * size).from_address(data.data_ptr()) if size else b""
            self._odd.append((data.element_size(), name, dtype, shape, bytes(memory)))
            self._header_bytes += len(self._entry(name, dtype, shape, size)) + _GROWTH
            self._odd_bytes += size
            return
        entry = self._entry(name, dtype, shape, size)
        if size:
            memory = (ctypes.c_char * size).from_address(data.data_ptr())
            self._file.write(memoryview(memory))
        self.data_bytes += size
        self._header_bytes += len(entry)
        self._entries.append(entry)

    def close(self) -> None:
        """Write what waits; the header is still to come."""
        for _, name, dtype, shape, data in sorted(self._odd, key=lambda item: -item[0]):
            self._entries.append(self._entry(name, dtype, shape, len(data)))
            self._file.write(data)
            self.data_bytes += len(data)
        self._odd.clear()

    def seal(self, about: Mapping[str, str]) -> None:
        """Write the header. Metadata that is longer than was foreseen is a bug of a codec."""
        header = (_opening(about) + "".join(self._entries) + "}").encode("ascii")
        room = self._reserved - 8
        if len(header) > room:
            raise QuantmillError(
                codes.WRITE_FAILED(
                    self.path.name, f"its header has {len(header)} bytes, {room} are kept", bug()
                )
            )
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room, b" "))
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        with contextlib.suppress(OSError):
            self._file.close()


def bug() -> str:
    """What to do about an error that no user causes."""
    return "this is a bug of quantmill or of a plugin: please report it"


def stored_dtype(name: str, tensor: Tensor) -> str:
    """The safetensors code of what is to be written under ``name``, both checked."""
    import torch

    try:
        bad = name == "__metadata__" or not name.encode()
    except UnicodeEncodeError:
        bad = True
    if bad or len(json.dumps(name)) > _LONGEST_NAME:
        shown = repr(name[:80])
        raise QuantmillError(codes.BAD_NAME(shown, "it can't stand in a header", bug()))
    cause = ""
    if tensor.layout != torch.strided or tensor.is_quantized:
        cause = f"its layout is {'quantized' if tensor.is_quantized else tensor.layout}"
    elif tensor.device.type == "meta":
        cause = "it is on the meta device and has no data"
    else:
        try:
            return code_of(tensor.dtype)
        except ValueError as error:
            cause = str(error)
    raise QuantmillError(codes.UNWRITABLE(name, cause, bug()))
