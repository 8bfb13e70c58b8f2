"""Marks a model as one that bitsandbytes quantized, where frameworks look for it."""

from __future__ import annotations

from typing import Any

from quantmill.job import Job
from quantmill_bnb.config import BnbConfig

__all__ = ["mark_model"]


def mark_model(job: Job, model: Any) -> None:
    """Set the attributes by which PEFT and Trainer recognise a quantized base."""
    if job.options.dequantize:
        return
    config = next(iter(job.selections.values())).config
    if isinstance(config, BnbConfig):
        model.is_loaded_in_4bit = config.load_in_4bit
        model.is_loaded_in_8bit = config.load_in_8bit
        model.is_quantized = True
        model.quantization_method = "bitsandbytes"
