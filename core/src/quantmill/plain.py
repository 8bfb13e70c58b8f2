"""Plain PyTorch: any ``nn.Module`` quantized in place, saved, loaded again, and back to float."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import Findings, QuantmillError, declare

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantmill.host import Host
    from quantmill.job import Job, Progress

__all__ = ["dequantize", "dequantize_model", "load_into", "quantize_model", "save_state"]

NOT_QUANTIZED = declare("QM-MODULE-010", "A file does not hold a quantized module")
OTHER_MODULE = declare("QM-MODULE-011", "A file holds another module")
CONFIG: Final = "quantization_config"
"""Key of a file's ``__metadata__``: the config, as JSON."""


def quantize_model(
    module: nn.Module,
    method: Any,
    *,
    device: str | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    allow_unmatched: bool = False,
    strict: bool = False,
    non_finite: str = "error",
    calibration: Any = None,
    seed: int = 0,
    share: bool = True,
    training: bool = False,
    progress: Progress | None = None,
    host: Host | None = None,
) -> nn.Module:
    """Quantize a live module of any framework, in place, and return it.

    Its linears (``nn.Linear``, transformers' ``Conv1D``, embeddings, stacked experts: what the
    method takes) become the method's; what is not a target stays the same object, with its dtype,
    and a module at several places stays one. Each weight is let go when its form is there.

    Args:
        module: any tree of modules, with its weights.
        method: METHOD as everywhere: a short name, a dict, a config, JSON text or a file.
        device: where the module goes; by default where its first parameter is.
        skip: patterns of modules to keep float.
        include: patterns of modules to quantize besides the default ones.
        allow_unmatched: a pattern may match nothing.
        strict: what is only warned of otherwise is an error.
        non_finite: ``error``, or ``keep`` to leave a module with NaN or infinity float.
        calibration: for calibrated methods, a sequence of arguments for the module's forward,
            one per call (a tensor, a tuple, or a mapping of keyword arguments); the module must
            hold its blocks in a ``ModuleList`` or ``Sequential``.
        seed: of what a method draws at random.
        share: that of :func:`quantmill.load`.
        training: prepare for adapters on a frozen base, as :func:`quantmill.load` does.
        progress: called with bytes done, bytes in all, and the module at hand.
        host: the plugins to use; by default all that are installed.

    Raises:
        FindingsError: every error found before anything is changed, at once.
        QuantmillError: a weight can't be quantized; the module is then partly quantized.
    """
    from quantmill.api import make_job, prepare
    from quantmill.modules import ModuleArchitecture, headers_of

    headers = headers_of(module)
    if device is None:
        device = next((str(item.device) for item in module.parameters()), "cpu")
    job = make_job(
        headers,
        method,
        device=device,
        skip=skip,
        include=include,
        host=host,
        progress=progress,
        allow_unmatched=allow_unmatched,
        strict=strict,
        non_finite=non_finite,
        calibration=calibration,
        seed=seed,
        share=share,
        training=training,
    )
    job.architecture = ModuleArchitecture(module)
    prepare(job).raise_errors()
    return _carry_out(job, module)


def _carry_out(job: Job, module: nn.Module) -> nn.Module:
    """Stages 4, 5 and 7 on a live module."""
    from quantmill.calibration.carry_out import carry_out
    from quantmill.modules import IS_TARGET, ModuleArchitecture, ModuleSink

    architecture = job.architecture
    assert job.plan is not None and isinstance(architecture, ModuleArchitecture)
    if any(entry.action == "quantize" and not entry.name for entry in job.plan.modules):
        kind = type(module).__name__
        raise QuantmillError(
            IS_TARGET(kind, f"it is a {kind} without a parent", "give it inside nn.Sequential")
        )
    training = module.training
    sink = ModuleSink(job, module, architecture)
    with job.stage("replace"):
        try:
            carry_out(job, sink)
        finally:
            sink.restore()
        sink.tie()
        architecture.finish(module, job.device)
    module.train(training)
    with job.stage("finalize"):
        for answer in job.host.hook.quantmill_finalize(job=job, model=module):
            job.findings.extend(answer or ())
    return module


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn the quantized modules of a model back into float ones, in place, and return it.

    The model is one of :func:`quantize_model`, :func:`load_into` or :func:`quantmill.load`; each
    weight gets its dequantized values, by default in the dtype it had.
    """
    from quantmill.stages.finalize import dequantize_model as back

    return back(model, dtype)


dequantize = dequantize_model


def save_state(model: nn.Module, path: Path) -> None:
    """Write a quantized module's state into one ``.safetensors`` file.

    Quantized weights lie in their method's own layout, with the config in the file's metadata.
    The file is there when it is complete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from quantmill.checkpoint import codes
    from quantmill.stages.table import stored_config

    job: Job = model.quantmill_job  # type: ignore[assignment]
    assert job.architecture is not None
    tied = job.architecture.tied
    aliases = [
        f"{alias}."
        for names in getattr(job.architecture, "aliases", {}).values()
        for alias in names
    ]
    state: dict[str, Tensor] = {
        name: value.detach().contiguous()
        for name, value in model.state_dict().items()
        if name not in tied and not any(name.startswith(alias) for alias in aliases)
    }
    # One key: the order of several would not be the same each time.
    metadata = {CONFIG: json.dumps(stored_config(job), sort_keys=True)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(state), temporary, metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        cause = f"it can't be written: {error}"
        raise QuantmillError(codes.WRITE_FAILED(str(path), cause, "choose another place")) from None
    finally:
        temporary.unlink(missing_ok=True)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: a file has no views."""
    seen: set[int] = set()
    made = {}
    for name, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return made


def load_into(
    module: nn.Module,
    path: str | Path,
    *,
    device: str = "cpu",
    strict: bool = False,
    progress: Progress | None = None,
    host: Host | None = None,
) -> nn.Module:
    """Load what :func:`quantmill.save` wrote of a plain module into a fresh float one, in place.

    ``module`` has the structure that the saved one had before it was quantized; its own weights
    are not looked at, and it may be on the meta device.

    Raises:
        QuantmillError: the file can't be read, is not of a quantized module, or is of another.
    """
    from quantmill.api import make_job, prepare
    from quantmill.host import default_host
    from quantmill.modules import ModuleArchitecture, not_quantized
    from quantmill.stages.quantize import open_reader

    host = host or default_host()
    not_quantized(module)
    headers = _headers(Path(path), host)
    job = make_job(headers, device=device, host=host, strict=strict, progress=progress)
    job.architecture = ModuleArchitecture(module, headers.tensors)
    plan = prepare(job)
    _check_same(job, module)
    plan.raise_errors()
    buffers = {name for name, _ in module.named_buffers()} & set(headers.tensors)
    _carry_out(job, module)
    with open_reader(headers) as reader:
        for name in sorted(buffers):
            owner, _, local = name.rpartition(".")
            part = module.get_submodule(owner)
            value = reader.tensor(name)
            if part._buffers.get(local) is not None:
                part._buffers[local] = value.clone().to(device)
    return module


def _check_same(job: Job, module: nn.Module) -> None:
    """Names and shapes of the file are those of the module.

    Raises:
        FindingsError: each difference.
    """
    from quantmill.stages.quantize import codec_of, member_headers

    assert job.plan is not None and job.architecture is not None
    there = job.headers.tensors
    quantized = {
        entry.target.name: job.selections[entry.method or ""]
        for entry in job.plan.modules
        if entry.action == "quantize" and entry.target is not None
    }
    used = {name for name, _ in module.named_buffers()}
    fix = "give a module of the structure that was saved"
    found = Findings()
    for info in job.architecture.modules:
        selection = quantized.get(info.name)
        if selection is not None:
            prefix = job.architecture.module_prefix(info)
            members = member_headers(prefix, codec_of(job, selection), job.headers)
            used |= {header.name for header in members.values()}
        for local, parameter in info.parameters.items():
            header = there.get(parameter.sources[0]) if parameter.sources else None
            if not parameter.sources or (selection is not None and local == "weight"):
                continue
            if header is None:
                found.add(OTHER_MODULE(parameter.name, "the file does not have it", fix))
            elif parameter.part is None and tuple(header.shape) != tuple(parameter.shape):
                sizes = f"{list(header.shape)} in the file, {list(parameter.shape)} in the module"
                found.add(OTHER_MODULE(parameter.name, f"its shape is {sizes}", fix))
            used |= set(parameter.sources)
    for name in sorted(set(there) - used):
        found.add(OTHER_MODULE(name, "the module has no place for it", fix))
    found.raise_errors()


def _headers(path: Path, host: Host) -> Any:
    from quantmill.checkpoint.containers import open_checkpoint

    headers = open_checkpoint(path, host)
    raw = headers.metadata.get(CONFIG)
    try:
        config = json.loads(raw) if raw is not None else None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        cause = f"its metadata has no {CONFIG}" if raw is None else f"its {CONFIG} is no JSON"
        fix = "give a file that quantmill.save(model, path) wrote of a plain module"
        raise QuantmillError(NOT_QUANTIZED(str(path), cause, fix))
    return dataclasses.replace(headers, config={CONFIG: config})
