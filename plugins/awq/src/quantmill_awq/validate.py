"""The config that writers keep in a file of its own: instead of config.json's, or beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantmill.checkpoint.files import read_json
from quantmill.findings import Finding, FindingsError, declare
from quantmill_awq.config import AwqConfig

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.job import Job

__all__ = ["check", "detect"]

CONFIGS_DISAGREE = declare(
    "QM-AWQ-010", "config.json and the config beside it of a checkpoint disagree"
)
BESIDE = ("quantize_config.json", "quant_config.json")
"""GPTQModel's name for it, and AutoAWQ's."""
_MARKERS = ("zero_point", "w_bit", "q_group_size")


def detect(headers: CheckpointHeaders) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint whose config.json has none: AutoAWQ's early
    files say all in ``quant_config.json``.

    Raises:
        FindingsError: that file is no JSON object.
    """
    if not any(name.endswith(".qweight") for name in headers.tensors):
        return None
    problems: list[Finding] = []
    for name in BESIDE:
        found = read_json(headers.source, name, problems, CONFIGS_DISAGREE)
        if problems:
            raise FindingsError(problems)
        if not found or found.get("quant_method", "awq") != "awq":
            continue
        if "quant_method" in found or any(key in found for key in _MARKERS):
            return {**found, "quant_method": "awq"}
    return None


def check(job: Job) -> Iterator[Finding]:
    """Compare the configs that a checkpoint carries."""
    stored = job.headers.config.get("quantization_config")
    if not job.prequantized or not isinstance(stored, dict):
        return
    if stored.get("quant_method") != "awq":
        return
    for file in BESIDE:
        problems: list[Finding] = []
        beside = read_json(job.headers.source, file, problems, CONFIGS_DISAGREE)
        yield from problems
        if beside is not None:
            yield from AwqConfig.disagreements(stored, beside, file, CONFIGS_DISAGREE, ("meta",))
