"""The quant_state tensor of a 4-bit weight: JSON text as bytes, in bitsandbytes' order of keys.

::

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4096, 4096],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0447}

The second line is there with double quantization only.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantmill.findings import declare
from quantmill_bnb.config import BLOCK_SIZES

__all__ = ["BAD_STATE", "NESTED_BLOCK", "State", "StateError"]

BAD_STATE = declare("QM-BNB-001", "A quantized weight's tensors contradict each other")
NESTED_BLOCK = 256
"""Scales per nested scale; fixed by the format."""


class StateError(ValueError):
    """The text is not a quant state; says why."""


@dataclass(frozen=True, slots=True)
class State:
    """What the quant_state tensor says."""

    kind: str
    block: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_dtype: torch.dtype = torch.float32
    nested_offset: float | None = None
    """None without double quantization."""

    def pack(self) -> Tensor:
        """The tensor, byte for byte what bitsandbytes writes."""
        state: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            state["nested_blocksize"] = NESTED_BLOCK
            state["nested_dtype"] = str(self.nested_dtype).removeprefix("torch.")
            state["nested_offset"] = self.nested_offset
        return torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8)

    @classmethod
    def unpack(cls, blob: Tensor, kind: str) -> State:
        """Read a tensor that is named after ``kind``; nothing in it is believed.

        Raises:
            StateError: it is no quant state, or one of something else.
        """
        if blob.dtype != torch.uint8 or blob.ndim != 1:
            raise StateError(f"{blob.dtype} {list(blob.shape)} is no text")
        try:
            state = json.loads(bytes(blob.tolist()).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise StateError(f"no JSON text: {error}") from None
        if not isinstance(state, dict):
            raise StateError("no JSON object")
        if state.get("quant_type") != kind:
            raise StateError(f"quant_type is {state.get('quant_type')!r}, not {kind!r}")
        shape = state.get("shape")
        if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
            raise StateError(f"shape is {shape!r}")
        block = state.get("blocksize")
        if not _is_count(block) or block not in BLOCK_SIZES:
            raise StateError(f"blocksize is {block!r}")
        nested: dict[str, Any] = {}
        if any(name.startswith("nested_") for name in state):
            offset = state.get("nested_offset")
            if isinstance(offset, bool) or not isinstance(offset, int | float):
                raise StateError(f"nested_offset is {offset!r}")
            if not math.isfinite(offset):
                raise StateError(f"nested_offset is {offset!r}")
            size = state.get("nested_blocksize")
            if size != NESTED_BLOCK:
                raise StateError(f"nested_blocksize is {size!r}, not {NESTED_BLOCK}")
            nested["nested_offset"] = float(offset)
            nested["nested_dtype"] = _dtype(state.get("nested_dtype"), "nested_dtype")
        return cls(kind, block, _dtype(state.get("dtype"), "dtype"), tuple(shape), **nested)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40


def _dtype(name: Any, key: str) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise StateError(f"{key} is {name!r}")
    return found
