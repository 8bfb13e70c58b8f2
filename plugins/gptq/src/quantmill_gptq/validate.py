"""The config that writers keep in a file of its own: instead of config.json's, or beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantmill.checkpoint.files import read_json
from quantmill.findings import Finding, FindingsError, declare
from quantmill_gptq.config import GptqConfig, is_gptq

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.job import Job

__all__ = ["check", "detect"]

CONFIGS_DISAGREE = declare(
    "QM-GPTQ-010", "quantize_config.json and config.json of a checkpoint disagree"
)
BESIDE = "quantize_config.json"
_MAY_DIFFER = GptqConfig.runtime_fields | {"act_group_aware", "meta"}
_OTHERS = ("zero_point", "w_bit")


def detect(headers: CheckpointHeaders) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint whose config.json has none: AutoGPTQ's early
    files say all in ``quantize_config.json``.

    Raises:
        FindingsError: that file is no JSON object.
    """
    if not any(name.endswith(".qweight") for name in headers.tensors):
        return None
    problems: list[Finding] = []
    found = read_json(headers.source, BESIDE, problems, CONFIGS_DISAGREE)
    if problems:
        raise FindingsError(problems)
    if not found or found.get("quant_method", "gptq") != "gptq" or not is_gptq(found):
        return None
    if "quant_method" not in found and any(key in found for key in _OTHERS):
        return None
    return {**found, "quant_method": "gptq"}


def check(job: Job) -> Iterator[Finding]:
    """Compare the two configs that a checkpoint of GPTQModel carries."""
    stored = job.headers.config.get("quantization_config")
    if not job.prequantized or not isinstance(stored, dict):
        return
    problems: list[Finding] = []
    beside = read_json(job.headers.source, BESIDE, problems, CONFIGS_DISAGREE)
    yield from problems
    if beside is not None and stored.get("quant_method") == "gptq":
        yield from GptqConfig.disagreements(stored, beside, BESIDE, CONFIGS_DISAGREE, _MAY_DIFFER)
