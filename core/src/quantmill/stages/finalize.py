"""Stage 7, set-up after quantization: config, adapters' needs, hooks, and the way back to float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.findings import Finding, QuantmillError, declare
from quantmill.job import Job
from quantmill.stages.attach import detach_forms
from quantmill.stages.quantize import factory_of
from quantmill.stages.table import stored_config

__all__ = ["core_finalize", "dequantize_model", "prepare_training"]

NOT_TRAINABLE = declare("QM-FINAL-001", "The method can't carry gradients to adapters")


def core_finalize(job: Job, model: nn.Module) -> Iterator[Finding]:
    """Freeze the quantized base, record the job, prepare for adapters if asked."""
    selection = next(iter(job.selections.values()), None)
    if selection is not None and not job.options.dequantize:
        model.quantmill_job = job  # type: ignore[assignment]
        config = getattr(model, "config", None)
        if config is not None:
            config.quantization_config = stored_config(job)
    if job.options.training:
        for item in job.selections.values():
            if not item.method.capabilities.trainable:
                raise QuantmillError(
                    NOT_TRAINABLE(
                        item.label,
                        f"{item.method.name} declares that it can't be trained through",
                        "take a trainable method: see `quantmill doctor`",
                    )
                )
        prepare_training(model, checkpointing=job.options.gradient_checkpointing)
    yield from ()


def prepare_training(model: nn.Module, *, checkpointing: bool = True) -> nn.Module:
    """Make a quantized model ready for adapters, as QLoRA does (arXiv 2305.14314).

    The base is frozen, norms and other one-dimensional float parameters go to float32, inputs of
    the first block get gradients, and gradient checkpointing is switched on if asked.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1 and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    for module in model.modules():
        # A norm in float32 gives float32: what stayed a 16-bit linear takes it in its own dtype.
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(_to_weight_dtype)
    if checkpointing:
        # transformers renamed these in 5.x; the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
            model, "gradient_checkpointing_enable", None
        )
        if callable(enable):
            enable()
    inputs = getattr(model, "enable_input_require_grads", None)
    if callable(inputs):
        inputs()
    model.train()
    return model


def _to_weight_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype
    return tuple(
        item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item
        for item in inputs
    )


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized linear of a model that quantmill loaded into ``nn.Linear``, in place.

    Modules are converted one at a time, so the peak is the float model and one weight.
    """
    job: Job | None = getattr(model, "quantmill_job", None)
    if job is None or job.plan is None:
        return model
    wanted = dtype or getattr(torch, job.plan.dtype)
    for entry in job.plan.modules:
        if entry.action != "quantize" or entry.target is None or entry.method is None:
            continue
        selection = job.selections[entry.method]
        old = model.get_submodule(entry.target.name)
        form = factory_of(job, selection).form_of(old)
        if form is None:
            continue
        weight = form.dequantize(wanted)
        bias = getattr(old, "bias", None)
        new = nn.Linear(
            entry.target.in_features,
            entry.target.out_features,
            bias=bias is not None,
            device="meta",
            dtype=wanted,
        )
        new.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().to(wanted), requires_grad=False)
        new.train(old.training)
        model.set_submodule(entry.target.name, new)
    detach_forms(model)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    del model.quantmill_job
    return model
