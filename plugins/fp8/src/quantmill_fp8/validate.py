"""Findings of the FP8 backend before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from quantmill.findings import Finding, Severity, declare
from quantmill.forms import Channel
from quantmill.job import Job
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config, SkipConfig

__all__ = ["check"]

NO_CALIBRATION = declare("QM-FP8-010", "Static activation scales need calibration")
WEIGHT_ONLY = declare(
    "QM-FP8-011", "Activations are computed with as they come, not in 8 bits", Severity.INFO
)
NOT_NATIVE = declare(
    "QM-FP8-015",
    "A GPU does not compute the products in 8 bits",
    Severity.WARNING,
    fallback=True,
)
FBGEMM_VERSION = declare(
    "QM-FP8-016",
    "The installed FBGEMM does not go with PyTorch",
    Severity.WARNING,
    fallback=True,
)
NO_EFFECT = declare(
    "QM-FP8-012", "An option of FP8 has no effect here", Severity.WARNING, fallback=True
)
WITHOUT_SCALES = declare("QM-FP8-014", "FP8 weights would be read without their scales")
TOO_OLD = declare("QM-FP8-013", "PyTorch does not know a dtype of scales")


def check(job: Job) -> Iterator[Finding]:
    """What the config asks for and does not get; scales that nobody would apply."""
    import torch

    yield from _without_scales(job)

    for selection in job.selections.values():
        config = selection.config
        if isinstance(config, FbgemmFp8Config | Fp8Config):
            yield from _activations(job, config, selection.label)
        if isinstance(config, FbgemmFp8Config):
            yield from _library()
        if not isinstance(config, Fp8Config):
            continue
        if config.dequantize:
            yield NO_EFFECT(
                "dequantize",
                "a config does not decide whether weights stay quantized",
                "load with dequantize=True",
            )
        if config.activation_scheme == "static" and not job.prequantized:
            yield NO_CALIBRATION(
                "activation_scheme",
                "static scales come from calibration, which this method does not do",
                "use activation_scheme=dynamic",
            )
        if config.scale_fmt == "ue8m0" and not hasattr(torch, "float8_e8m0fnu"):
            yield TOO_OLD(
                "scale_fmt",
                f"PyTorch {torch.__version__} has no float8_e8m0fnu",
                "install torch>=2.7, or use scale_fmt=float",
            )


def _activations(job: Job, config: SkipConfig, label: str) -> Iterator[Finding]:
    """What becomes of activations: on a CPU that of the peer, on a GPU a fallback where it is."""
    field = "activation_scheme" if isinstance(config, Fp8Config) else "activation_scale_ub"
    if not job.device.startswith("cuda"):
        yield WEIGHT_ONLY(
            field,
            f"{field} is for GPUs, which round activations to 8 bits; weights alone are in 8 bits"
            f" on {job.device}",
            "nothing to do: results are closer to the float model's",
        )
        return
    if job.options.output or job.options.dequantize:
        return
    from quantmill_fp8.codec import grouping_of
    from quantmill_fp8.native import kind_of, unavailable

    grouping = grouping_of(config) if isinstance(config, Fp8Config) else Channel(0)
    kind = kind_of(grouping)
    reason = f"there is no product for scales by {grouping}"
    if kind is not None:
        found = unavailable(kind, job.device)
        uneven = [] if found else _uneven(job, label, 128 if kind == "block" else 16)
        if found is None and not uneven:
            return
        reason = found or (
            f"{len(uneven)} weights have other shapes than multiples of"
            f" {128 if kind == 'block' else 16}, the first is {uneven[0]}"
        )
    yield NOT_NATIVE(
        field,
        f"{reason}; there a kernel reads the 8-bit weight, and activations stay in 16 bits",
        "nothing to do, or use a device of compute capability 8.9 and fp8-row or fp8-block",
    )


def _uneven(job: Job, label: str, multiple: int) -> list[str]:
    """Names of planned weights whose shape no 8-bit product takes."""
    plan = job.plan
    return [
        entry.name
        for entry in (plan.modules if plan is not None else ())
        if entry.method == label
        and entry.target is not None
        and (entry.target.out_features % multiple or entry.target.in_features % multiple)
    ]


def _library() -> Iterator[Finding]:
    """An FBGEMM that is there and of a wrong version would crash when it is imported."""
    from quantmill_fp8.fbgemm import installed, problem

    found = problem() if installed() is not None else None
    if found is not None:
        yield FBGEMM_VERSION("fbgemm-gpu", f"{found[0]}; it is not used", found[1])


def _without_scales(job: Job) -> Iterator[Finding]:
    """Modules that stay float and whose weights the file holds in 8 bits with scales.

    Experts that the file has in one tensor, scales and all, are such: no form is made of them,
    and the bare values are not the weights.
    """
    ours = any(isinstance(item.config, SkipConfig) for item in job.selections.values())
    if not ours or not job.prequantized or job.plan is None or job.architecture is None:
        return
    made = {
        entry.target.name
        for entry in job.plan.modules
        if entry.action == "quantize" and entry.target is not None
    }
    tensors = job.headers.tensors
    told: set[str] = set()
    for module in job.architecture.modules:
        if module.name in made:
            continue
        scaled = [
            name
            for parameter in module.parameters.values()
            for name in parameter.sources
            if tensors[name].dtype.startswith("F8_")
            and (f"{name}_scale_inv" in tensors or f"{name}_scale" in tensors)
        ]
        if scaled and scaled[0] not in told:
            told.add(scaled[0])  # Every expert would say so of its stack.
            yield WITHOUT_SCALES(
                module.name,
                f"{scaled[0]} is in FP8 with scales ({len(scaled)} such tensors), and modules of"
                f" kind {module.kind} are read as float numbers without them",
                "save it dequantized by transformers (dequantize=True) and quantize that",
            )
