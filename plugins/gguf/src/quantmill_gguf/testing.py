"""Small GGUF files for tests."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill_gguf.types import TYPES
from quantmill_gguf.writer import GgufWriter, TensorSpec

__all__ = ["KINDS", "METADATA", "entry", "header", "matrices", "padded", "text", "write"]

METADATA: dict[str, Any] = {
    "general.architecture": "nothing-known",
    "general.name": "caf\u00e9",
    "a.uint8": 200,
    "a.int64": -(2**40),
    "a.float64": 0.1,
    "a.bool": True,
    "a.texts": ["one", "", "three"],
    "a.numbers": [1, 2, 3],
    "a.floats": [0.5, 1.5],
}
KINDS = {"a.uint8": "uint8", "a.int64": "int64", "a.float64": "float64", "a.numbers": "uint16"}


def matrices(seed: int = 0) -> dict[str, tuple[str, Tensor]]:
    """Name to type and raw bytes ``[rows, row bytes]``: one matrix of every type."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, kind in TYPES.items():
        size = (3, 2 * kind.info.size)
        raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        found[f"m.{name.lower()}.weight"] = (name, raw)
    return found


def write(path: Path, tensors: dict[str, tuple[str, Tensor]], **options: Any) -> Path:
    """A file of raw matrices."""
    specs = []
    for name, (kind, raw) in tensors.items():
        info = TYPES[kind].info
        specs.append(TensorSpec(name, kind, (raw.shape[0], raw.shape[1] // info.size * info.block)))
    metadata = options.pop("metadata", METADATA)
    kinds = {**KINDS, **options.pop("kinds", {})}
    with GgufWriter(path, metadata, specs, kinds=kinds, **options) as writer:
        for _, raw in tensors.values():
            writer.write(raw)
    return path


def header(tensors: int = 0, keys: int = 0, version: int = 3, order: str = "<") -> bytes:
    """The first 24 bytes."""
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, keys)


def text(value: bytes, order: str = "<") -> bytes:
    """A length and the bytes."""
    return struct.pack(f"{order}Q", len(value)) + value


def entry(
    name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    """The description of one tensor."""
    head = text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return head + struct.pack("<IQ", kind, offset)


def padded(data: bytes, extra: int = 0) -> bytes:
    """To a multiple of 32, and ``extra`` bytes of data."""
    return data + bytes(-len(data) % 32) + bytes(extra)
