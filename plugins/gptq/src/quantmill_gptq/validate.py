"""Findings of the GPTQ backend before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from quantmill.findings import Finding, declare
from quantmill.job import Job

__all__ = ["check"]

CONFIGS_DISAGREE = declare(
    "QM-GPTQ-010", "quantize_config.json and config.json of a checkpoint disagree"
)
_SAME = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "lm_head", "dynamic")


def check(job: Job) -> Iterator[Finding]:
    """Compare the two configs that a checkpoint of GPTQModel carries."""
    stored = job.headers.config.get("quantization_config")
    source = job.headers.source
    if not job.prequantized or not isinstance(stored, dict):
        return
    if not source.exists("quantize_config.json"):
        return
    try:
        beside: Any = json.loads(
            source.read("quantize_config.json", 0, source.size("quantize_config.json"))
        )
    except (ValueError, UnicodeDecodeError) as error:
        yield CONFIGS_DISAGREE("quantize_config.json", f"not valid JSON: {error}", "remove it")
        return
    for name in _SAME:
        if name in beside and name in stored and beside[name] != stored[name]:
            yield CONFIGS_DISAGREE(
                f"quantize_config.json: {name}",
                f"it says {beside[name]!r}, config.json says {stored[name]!r}",
                "correct or remove the wrong one",
            )
