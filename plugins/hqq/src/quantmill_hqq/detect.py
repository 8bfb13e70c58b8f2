"""Recognises checkpoints that hqq wrote itself: their ``config.json`` says nothing of it.

The settings are in the files, as small tensors beside the codes; those of the first module are
read (a few bytes) and put in words as transformers would. Other modules may differ: each is
decoded by its own tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders

__all__ = ["SETTINGS", "detect", "stored_config"]

SETTINGS = ("nbits", "group_size", "axis")
"""What a module's own settings say in words of a config."""

_FORMATS = {"I32": "<i", "F32": "<f"}
"""Of a number; 1.58 bits are a float."""


def detect(headers: CheckpointHeaders) -> dict[str, Any] | None:
    """The ``quantization_config`` that the tensors stand for, or None where there are none."""
    for name in headers.tensors:
        prefix, _, local = name.rpartition(".")
        if local != "W_q" or f"{prefix}.scale" not in headers.tensors:
            continue
        settings: dict[str, Any] = {}
        for key in SETTINGS:
            value = _number(headers, f"{prefix}.{key}")
            if value is not None:
                settings[key] = value
        return stored_config(settings)
    return None


def stored_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` that transformers would write for the :data:`SETTINGS` of a
    module."""
    return {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": dict(settings)},
        "skip_modules": [],
    }


def _number(headers: CheckpointHeaders, name: str) -> float | None:
    header = headers.tensors.get(name)
    if header is None or header.dtype not in _FORMATS or header.nbytes != 4:
        return None
    raw = headers.source.read(header.file, header.start, header.stop)
    value: float = struct.unpack(_FORMATS[header.dtype], raw)[0]
    return round(value, 2)
