"""The config that writers keep in a file of its own: instead of config.json's, or beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantmill.checkpoint.files import read_json
from quantmill.findings import Finding, FindingsError, Severity, declare
from quantmill_gptq.config import GptqConfig, is_gptq
from quantmill_gptq.widths import words

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.job import Job

__all__ = ["check", "detect"]

CONFIGS_DISAGREE = declare(
    "QM-GPTQ-010", "quantize_config.json and config.json of a checkpoint disagree"
)
OTHER_TENSORS = declare(
    "QM-GPTQ-011",
    "A checkpoint's tensors have other bits or groups than its config says",
    Severity.WARNING,
    fallback=True,
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
    """Compare the two configs that a checkpoint of GPTQModel carries, and what they say with its
    tensors, which outrank them."""
    stored = job.headers.config.get("quantization_config")
    if not job.prequantized or not isinstance(stored, dict):
        return
    problems: list[Finding] = []
    beside = read_json(job.headers.source, BESIDE, problems, CONFIGS_DISAGREE)
    yield from problems
    if beside is not None and stored.get("quant_method") == "gptq":
        yield from GptqConfig.disagreements(stored, beside, BESIDE, CONFIGS_DISAGREE, _MAY_DIFFER)
    for selection in job.selections.values():
        if isinstance(selection.config, GptqConfig) and not selection.config.dynamic:
            yield from _others(job.headers, selection.config)


def _others(headers: CheckpointHeaders, config: GptqConfig) -> Iterator[Finding]:
    """One finding for all modules that are not as a config without exceptions has them."""
    others = []
    for name, header in headers.tensors.items():
        prefix, _, local = name.rpartition(".")
        zeros, scales = (headers.tensors.get(f"{prefix}.{x}") for x in ("qzeros", "scales"))
        if local != "qweight" or zeros is None or scales is None:
            continue
        if any(len(item.shape) != 2 for item in (header, zeros, scales)):
            continue  # decoding refuses it
        columns = header.shape[0] * 32 // config.bits
        size = columns if config.group_size == -1 else config.group_size
        as_said = words(scales.shape[1], config.bits) == zeros.shape[1]
        # The last word of a row need not be full.
        least = -(-(columns - 31 // config.bits) // size)
        if not as_said or not least <= scales.shape[0] <= -(-columns // size):
            others.append(prefix)
    if others:
        yield OTHER_TENSORS(
            others[0],
            f"it and {len(others) - 1} more have other bits or groups than the config's"
            f" {config.bits} bits in groups of {config.group_size}: they are taken as they are",
            "correct quantization_config: readers that believe it compute something else",
        )
