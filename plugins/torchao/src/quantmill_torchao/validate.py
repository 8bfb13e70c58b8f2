"""Findings of the torchao backend before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from quantmill.findings import Finding, Severity, declare
from quantmill.job import Job
from quantmill_torchao.config import TorchaoConfig

__all__ = ["check"]

ONE_DEVICE = declare(
    "QM-TORCHAO-011",
    "torchao itself runs a weight of this kind on some devices only",
    Severity.INFO,
)
ROUNDED_WIDE = declare(
    "QM-TORCHAO-012",
    "8-bit activations are computed with in 16 bits",
    Severity.WARNING,
    fallback=True,
)


def check(job: Job) -> Iterator[Finding]:
    """What the config asks for and gets otherwise."""
    import torch

    for selection in job.selections.values():
        config = selection.config
        if not isinstance(config, TorchaoConfig):
            continue
        recipe = config.recipe
        if recipe.tensor == "Int4Tensor" and job.options.output:
            yield ONE_DEVICE(
                "quant_type",
                "Int4Tensor computes with the library mslk on CUDA only",
                "for other devices take IntxWeightOnlyConfig with weight_dtype=int4",
            )
        if recipe.inputs is None or not job.device.startswith("cuda"):
            continue
        if not torch.cuda.is_available():
            continue
        have = torch.cuda.get_device_capability(job.device)
        if have < (8, 9):
            yield ROUNDED_WIDE(
                "quant_type",
                f"{recipe.inputs.kind} products need compute capability 8.9, this device has"
                f" {have[0]}.{have[1]}; activations are rounded and the product is in 16 bits",
                "take a weight-only config, or a newer device",
            )
