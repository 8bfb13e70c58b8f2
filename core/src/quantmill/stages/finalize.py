"""Stage 7, set-up after quantization: config, adapters' needs, hooks, and the way back to float."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.embedding import FormEmbedding, float_embedding
from quantmill.experts import LinearExperts, restack
from quantmill.findings import Finding, QuantmillError, Severity, declare
from quantmill.forms import Form
from quantmill.job import Job
from quantmill.kept import keep_fast, plain_again
from quantmill.linear import FormLinear
from quantmill.stages.attach import detach_forms
from quantmill.stages.quantize import factory_of
from quantmill.stages.table import stored_config

__all__ = ["core_finalize", "dequantize_model", "prepare_training"]

# transformers renamed its own in 5.x (the old name warns); the last is diffusers'.
_CHECKPOINTING = (
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
    "enable_gradient_checkpointing",
)

NOT_TRAINABLE = declare("QM-FINAL-001", "The method can't carry gradients to adapters")
NO_CHECKPOINTING = declare(
    "QM-FINAL-002",
    "The model can't be trained with gradient checkpointing",
    Severity.WARNING,
    fallback=True,
)


def core_finalize(job: Job, model: nn.Module) -> Iterator[Finding]:
    """Freeze the quantized base, record the job, prepare for adapters if asked."""
    selection = next(iter(job.selections.values()), None)
    if selection is not None and not job.options.dequantize:
        model.quantmill_job = job  # type: ignore[assignment]
        if job.architecture is not None:
            job.architecture.quantized(model, stored_config(job))
        for part in model.modules():
            if isinstance(part, LinearExperts):
                part.group()
        keep_fast(model, job.kernels)
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
        checkpointing = job.options.gradient_checkpointing
        if checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
            checkpointing = False
            yield NO_CHECKPOINTING(
                type(model).__name__,
                "the framework has no gradient checkpointing for it; activations stay in memory",
                "pass gradient_checkpointing=False",
            )
        prepare_training(model, checkpointing=checkpointing)


def prepare_training(model: nn.Module, *, checkpointing: bool = True) -> nn.Module:
    """Make a quantized model ready for adapters, as QLoRA does (arXiv 2305.14314).

    The base is frozen, norms compute in float32 between 16-bit neighbours, inputs of the first
    block get gradients, and gradient checkpointing is switched on if asked.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            _norm_in_float32(module)
    if checkpointing:
        for name in _CHECKPOINTING:
            enable = getattr(model, name, None)
            if callable(enable):
                enable()
                break
    inputs = getattr(model, "enable_input_require_grads", None)
    if callable(inputs):
        inputs()
    model.train()
    return model


def _norm_in_float32(module: nn.Module) -> None:
    """Put a norm's own weights into float32; everything around it keeps its dtype, so that masks,
    experts and convolutions, which no hook of ours sees, still meet tensors of one dtype."""
    stores = (module._parameters, module._buffers)
    own = [tensor for store in stores for tensor in store.values() if tensor is not None]
    narrow = [tensor for tensor in own if tensor.dtype in (torch.float16, torch.bfloat16)]
    if not narrow:
        return
    dtype = narrow[0].dtype
    for tensor in narrow:
        tensor.data = tensor.data.to(torch.float32)
    module.register_forward_pre_hook(partial(_cast_inputs, torch.float32))
    module.register_forward_hook(partial(_cast_output, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast_inputs(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(item, dtype) for item in inputs)


def _cast_output(
    dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> Any:
    return _cast(output, dtype)


def _share(job: Job, model: nn.Module, dtype: torch.dtype) -> None:
    """Give the float weight of a module back to those that share it."""
    tied = job.architecture.tied if job.architecture is not None else {}
    for name, owner in tied.items():
        path, _, local = name.rpartition(".")
        old = model.get_submodule(path)
        if not isinstance(old, FormLinear | FormEmbedding):
            continue
        weight = model.get_parameter(owner)
        bias = getattr(old, "bias", None)
        new: nn.Module
        rows, columns = weight.shape
        if isinstance(old, FormLinear):
            new = nn.Linear(columns, rows, bias is not None, device="meta", dtype=dtype)
            if bias is not None:
                new.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
            new.register_parameter(local, weight)
        else:
            new = float_embedding(old, weight)
        new.train(old.training)
        model.set_submodule(path, new)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized linear of a model that quantmill loaded into the float one, in place.

    Modules are converted one at a time, so the peak is the float model and one weight.
    """
    job: Job | None = getattr(model, "quantmill_job", None)
    if job is None or job.plan is None:
        return model
    common = dtype or getattr(torch, job.plan.dtype)
    for entry in job.plan.modules:
        if entry.action != "quantize" or entry.target is None or entry.method is None:
            continue
        selection = job.selections[entry.method]
        old = model.get_submodule(entry.target.name)
        form = factory_of(job, selection).form_of(old)
        if form is None:
            # A framework's module that stands for the method's may hold the form.
            held: Any = getattr(old, "form", None)
            form = held if isinstance(held, Form) else None
        if form is None:
            continue
        wanted = dtype or form.dtype
        weight = form.dequantize(wanted)
        bias = getattr(old, "bias", None)
        new = job.architecture.float_module(entry.target) if job.architecture else None
        if new is None:
            new = nn.Linear(
                entry.target.in_features,
                entry.target.out_features,
                bias=bias is not None,
                device="meta",
                dtype=wanted,
            )
        elif entry.target.transposed:
            weight = weight.transpose(-1, -2).contiguous()
        new.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        if bias is not None:
            value = nn.Parameter(bias.detach().to(wanted), requires_grad=False)
            new.register_parameter("bias", value)
        for name, buffer in new._buffers.items():
            if buffer is not None and buffer.is_meta:  # Of a fresh module: nobody computed it.
                new._buffers[name] = old._buffers.get(name)
        new.train(old.training)
        model.set_submodule(entry.target.name, new)
    _share(job, model, common)
    plain_again(model)
    detach_forms(model)
    for part in model.modules():
        if isinstance(part, LinearExperts):
            restack(part)
    del model.quantmill_job
    if job.architecture is not None:
        job.architecture.dequantized(model)
    return model
