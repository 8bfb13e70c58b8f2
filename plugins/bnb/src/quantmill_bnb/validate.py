"""Findings of the bitsandbytes backend before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from quantmill.findings import Finding, Severity, declare
from quantmill.job import Job
from quantmill_bnb.config import BnbConfig

__all__ = ["check"]

NO_EFFECT = declare(
    "QM-BNB-011", "An option of bitsandbytes has no effect here", Severity.WARNING, fallback=True
)
RAGGED = declare(
    "QM-BNB-010",
    "A width is no multiple of the block size; its linear computes slower",
    Severity.WARNING,
    fallback=True,
)


def check(job: Job) -> Iterator[Finding]:
    """Options that do nothing here; ragged widths on the CPU, named once for all modules."""
    for selection in job.selections.values():
        for name in ("llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"):
            if getattr(selection.config, name, False):
                yield NO_EFFECT(
                    name,
                    "weights are always quantized once and stay on the job's device",
                    f"leave {name} out",
                )
    if job.plan is None or job.device != "cpu":
        return
    for selection in job.selections.values():
        config = selection.config
        if not isinstance(config, BnbConfig) or not config.load_in_4bit:
            continue
        ragged = [
            entry.name
            for entry in job.plan.modules
            if entry.target is not None
            and entry.method == selection.label
            and entry.target.in_features % config.bnb_4bit_blocksize
        ]
        if ragged:
            yield RAGGED(
                ragged[0] + (f" and {len(ragged) - 1} more" if len(ragged) > 1 else ""),
                f"their widths are no multiple of {config.bnb_4bit_blocksize}, which the fused"
                " CPU kernel needs; they are dequantized at each forward",
                "nothing to do; a smaller bnb_4bit_blocksize may divide the width",
            )
