"""A weight in one run of memory: a head of numbers, then its parts (``c/matmul.h``, ``QM_PART_*``).

One tensor, so that a call passes one address, and a compiled graph one argument.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantmill_cpu.native import library
from quantmill_cpu.pages import weight_memory, written

__all__ = [
    "CODED",
    "KINDS",
    "LEVEL_KINDS",
    "PARTS",
    "ROW",
    "Spec",
    "assemble",
    "finish",
    "parts_of",
]

PARTS: Final = (
    "facts",
    "lookup",
    "order",
    "scale",
    "scale_table",
    "scale_level",
    "offset",
    "offset_table",
    "offset_level",
    "codes",
)
"""In the order of ``QM_PART_*``."""
_FLOATS: Final = ("lookup", "scale_table", "offset_table")
_VALUES: Final = {"scale": 5, "offset": 12}
"""Where the head has the numbers of each."""
_NUMBERS, _CONSTANTS, _PLACES = 19, 19, 24
"""int64 of the spec, and where in the head the constants and the parts' places lie."""
_HEAD, _FACTS, _STEP = 384, 704, 64
KINDS: Final = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
}
"""Numbers of the dtypes that scales and offsets may have as they are."""
CODED: Final = 7
LEVEL_KINDS: Final = {dtype: number for dtype, number in KINDS.items() if dtype.is_floating_point}
"""Those of dtypes that a second level may have."""
ROW: Final = 2
"""``QM_LEVEL_ROW``: the second level lies in panels."""
_DTYPES: Final = {number: dtype for dtype, number in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """The head's numbers."""

    numbers: tuple[int, ...]
    """``QM_SPEC_ROWS`` to the last one of the offset."""
    constants: tuple[float, ...]
    """``QM_SPEC_CONSTANTS``."""


def _ceil(size: int) -> int:
    return -(-size // _STEP) * _STEP


def assemble(spec: Spec, parts: Mapping[str, Tensor], codes: int, device: torch.device) -> Tensor:
    """The weight with every part but the codes filled, uint8; ``codes`` is the size of these.

    The caller fills the codes' part and then calls :func:`finish`. On the meta device only the
    size is right.
    """
    sizes = {"facts": _FACTS, "codes": codes}
    sizes |= {name: tensor.numel() * tensor.element_size() for name, tensor in parts.items()}
    places: dict[str, tuple[int, int]] = {}
    at = _HEAD
    for name in PARTS:
        if sizes.get(name):
            places[name] = (at, sizes[name])
            at = _ceil(at + sizes[name])
    if device.type == "meta":
        return torch.empty(at, dtype=torch.uint8, device=device)
    weight = weight_memory.take(at)
    head = weight[:_HEAD].view(torch.int64)
    head.zero_()
    head[:_NUMBERS] = torch.tensor(spec.numbers)
    constants = head[_CONSTANTS:_PLACES].view(torch.float32)
    constants[: len(spec.constants)] = torch.tensor(spec.constants)
    table = [number for name in PARTS for number in places.get(name, (0, 0))]
    head[_PLACES : _PLACES + len(table)] = torch.tensor(table)
    for name, tensor in parts.items():
        if tensor.numel():
            start, size = places[name]
            if device.type == "cpu" and tensor.is_contiguous():
                # Not by PyTorch, whose threads go on spinning where others have work by then.
                ctypes.memmove(weight.data_ptr() + start, tensor.data_ptr(), size)
                continue
            into = weight[start : start + size].view(tensor.dtype).view(tensor.shape)
            into.copy_(tensor)
    return weight


def finish(weight: Tensor) -> None:
    """Let the library work out what it needs to know of the lookup."""
    library().qm_weight_finish(weight.data_ptr())
    written(weight)


def parts_of(weight: Tensor) -> dict[str, Tensor]:
    """The parts as views, with the dtypes and, for scales and offsets, the shapes they have."""
    head = weight[:_HEAD].view(torch.int64).tolist()
    rows, columns, size = head[0], head[1], head[3]
    panels, groups = -(-rows // 16), -(-columns // size)
    found: dict[str, Tensor] = {}
    for index, name in enumerate(PARTS):
        start, count = head[_PLACES + 2 * index : _PLACES + 2 * index + 2]
        if not count:
            continue
        part = weight[start : start + count]
        if name in _FLOATS:
            part = part.view(torch.float32)
        elif name == "order":
            part = part.view(torch.int32)
        elif name in _VALUES:
            kind, lanes = head[_VALUES[name] :][:2]
            if kind != CODED:
                part = part.view(_DTYPES[kind])
            if kind != CODED or lanes != 16:
                part = part.view({16: (panels, groups, 16), 1: (panels, groups), 0: (1,)}[lanes])
        elif name.endswith("_level"):
            _, _, _, level, kind, _, stride = head[_VALUES[name.removesuffix("_level")] :][:7]
            part = part.view(_DTYPES[kind])
            if level == ROW:
                part = part.view(panels, stride, 16)
        found[name] = part
    return found
