"""What a user calls: plan, load, quantize. Each makes a job and runs the stages on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from quantmill.findings import Findings, QuantmillError, declare
from quantmill.host import Host, default_host
from quantmill.job import Job, Options, Progress, Request
from quantmill.processes import local_device
from quantmill.registrations import resolve

if TYPE_CHECKING:
    from torch import nn

    from quantmill.planning import Plan
    from quantmill.stages.write import WriteReport

__all__ = [
    "load",
    "load_tokenizer",
    "make_job",
    "method_schema",
    "plan",
    "prepare",
    "quantize",
]

BAD_DTYPE = declare("QM-DTYPE-001", "The dtype can't be a model's")
BAD_DEVICE = declare("QM-DEVICE-004", "A device's name can't be read")
NO_TOKENIZER = declare("QM-ARCH-010", "No tokenizer can be loaded from the source")
_DTYPES = ("float32", "bfloat16", "float16")


def make_job(
    source: str | Path | Any,
    method: Any = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    imatrix: str | Path | None = None,
    host: Host | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Job:
    """A job for ``source`` (folder, file, Hub id) and METHOD, with its headers read.

    ``imatrix`` is an option of the method, of those that take an importance matrix.

    Raises:
        QuantmillError: the source or METHOD can't be read.
    """
    from quantmill.checkpoint.containers import container_for, open_checkpoint
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.stages.select import detect, parse_method

    host = host or default_host()
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise QuantmillError(
            BAD_DTYPE("dtype", f"{name!r} is none of {', '.join(_DTYPES)}", "choose one of them")
        )
    request: Request = parse_method(method, host)
    request = dataclasses.replace(
        request, skip=(*request.skip, *skip), include=(*request.include, *include)
    )
    if imatrix is not None:
        raw = {**(request.raw or {}), "imatrix": str(imatrix)}
        request = dataclasses.replace(request, raw=raw)
    _check_device(str(device))
    headers = source if isinstance(source, CheckpointHeaders) else open_checkpoint(source, host)
    detect(headers, host)
    output = options.get("output")
    return Job(
        host=host,
        headers=headers,
        request=request,
        device=local_device(str(device)) if options.get("share") else str(device),
        dtype=name,
        options=Options(**options),
        container=None if output is None else container_for(output, host),
        progress=progress,
        findings=Findings(headers.findings),
    )


def _check_device(device: str) -> None:
    import torch

    try:
        torch.device(device)
    except RuntimeError as error:
        raise QuantmillError(
            BAD_DEVICE(device, str(error).splitlines()[0], "write cpu, cuda or cuda:0")
        ) from None


def prepare(job: Job, *, allow_float: bool = False) -> Plan:
    """Stages 1 to 3 and 6 on a job: what precedes the work. Reads headers, never weights."""
    from quantmill.stages.select import select
    from quantmill.stages.target import make_plan
    from quantmill.stages.validate import validate

    float_wanted = job.request.raw is None and not job.headers.config.get("quantization_config")
    if not (float_wanted and allow_float):
        select(job)
    made = make_plan(job)
    validate(job)
    return made


def plan(
    source: str | Path,
    method: Any = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    allow_unmatched: bool = False,
    strict: bool = False,
    max_memory: Mapping[str, int] | None = None,
    output: str | Path | None = None,
    imatrix: str | Path | None = None,
    host: Host | None = None,
) -> Plan:
    """What would happen to every module, in exact bytes. Reads headers, never weights.

    With ``output`` it is planned how :func:`quantize` would write that folder or file. With
    ``imatrix``, methods that weigh errors do so by the importance matrix in that file.

    Problems are in ``plan.findings``; :meth:`Plan.raise_errors` raises the errors among them.

    Raises:
        QuantmillError: there is nothing to plan (unreadable source, unknown or invalid method).
    """
    job = make_job(
        source,
        method,
        device=device,
        dtype=dtype,
        skip=skip,
        include=include,
        host=host,
        allow_unmatched=allow_unmatched,
        strict=strict,
        max_memory=max_memory,
        output=None if output is None else str(output),
        planning=True,
        imatrix=imatrix,
    )
    return prepare(job)


def load(
    source: str | Path,
    method: Any = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    max_memory: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    allow_unmatched: bool = False,
    strict: bool = False,
    training: bool = False,
    gradient_checkpointing: bool = True,
    dequantize: bool = False,
    non_finite: str = "error",
    calibration: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    share: bool = True,
    progress: Progress | None = None,
    host: Host | None = None,
) -> nn.Module:
    """A live model, quantized on the fly or from a quantized checkpoint, streaming.

    Without a method a float checkpoint loads as it is and a quantized one as it says.
    ``training`` prepares the model for adapters (QLoRA). Calibrated methods take ``calibration``
    (a path, texts or token ids), of which at most ``samples`` windows of ``length`` tokens are
    chosen by ``seed``; started by ``torchrun``, the processes that make the same call share that
    work, unless ``share`` is false.

    Raises:
        FindingsError: every error found before loading, at once.
        QuantmillError: a weight can't be read or quantized.
    """
    job = make_job(
        source,
        method,
        device=device,
        dtype=dtype,
        skip=skip,
        include=include,
        host=host,
        progress=progress,
        allow_unmatched=allow_unmatched,
        strict=strict,
        training=training,
        gradient_checkpointing=gradient_checkpointing,
        dequantize=dequantize,
        non_finite=non_finite,
        max_memory=max_memory,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        share=share,
    )
    from quantmill.loading import load_job

    prepare(job, allow_float=True)
    return load_job(job)


def quantize(
    source: str | Path | Any,
    output: str | Path,
    method: Any,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    allow_unmatched: bool = False,
    strict: bool = False,
    non_finite: str = "error",
    max_shard_bytes: int | None = None,
    calibration: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    share: bool = True,
    imatrix: str | Path | None = None,
    progress: Progress | None = None,
    host: Host | None = None,
) -> WriteReport:
    """Quantize a checkpoint into a new folder, streaming; the folder appears when it is complete.

    Where ``output`` ends like a file of a registered format (``.gguf``), that is what is written.
    Files of a folder have at most ``max_shard_bytes`` of tensors, 5 GB by default; such a file is
    split only if it is given.

    Calibrated methods take ``calibration`` as :func:`load` does; such a job can be interrupted
    and goes on, with the same bytes in the end, when it is called again in the same way. Started
    by ``torchrun``, the processes that make the same call share the work, the first one writes, and
    all return when the folder is there; with ``share=False`` each is on its own.

    ``imatrix`` is the path of an importance matrix (see :func:`imatrix`), for methods that weigh
    errors by one.

    Raises:
        FindingsError: every error found before anything is written, at once.
        QuantmillError: a weight can't be quantized or written; nothing is left behind.
    """
    from quantmill.calibration.carry_out import carry_out, resume_folder
    from quantmill.stages.write import WriteReport, write_checkpoint

    job = make_job(
        source,
        method,
        device=device,
        dtype=dtype,
        skip=skip,
        include=include,
        host=host,
        progress=progress,
        allow_unmatched=allow_unmatched,
        strict=strict,
        non_finite=non_finite,
        output=str(output),
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        share=share,
        imatrix=imatrix,
    )
    prepare(job).raise_errors()
    folder, keep = Path(output), resume_folder(Path(output))
    start = perf_counter()
    if job.processes.first:
        write_checkpoint(job, folder, max_shard_bytes, lambda job, sink: carry_out(job, sink, keep))
    else:
        carry_out(job, None, keep)
    job.processes.wait()
    return WriteReport.of(job, folder, perf_counter() - start)


def load_tokenizer(source: str | Path, *, host: Host | None = None) -> Any:
    """The tokenizer that belongs to a source, through an installed framework.

    Raises:
        QuantmillError: no framework is installed, or the source has no tokenizer.
    """
    from quantmill.checkpoint.containers import container_of
    from quantmill.checkpoint.source import open_source

    host = host or default_host()
    container = container_of(source, host)
    if container is not None:
        loaders = [(container.tokenizer, Path(source))]
    else:
        opened: Any = open_source(source)
        loaders = [(item.tokenizer, opened) for item in host.model_sources]
    for loader, argument in loaders:
        tokenizer = resolve(loader)(argument) if loader is not None else None
        if tokenizer is not None:
            return tokenizer
    raise QuantmillError(
        NO_TOKENIZER(
            str(source),
            "it has no tokenizer files, or no framework that reads them is installed",
            'add tokenizer.json, or pip install "quantmill[transformers]"',
        )
    )


def method_schema(name: str, host: Host | None = None) -> dict[str, Any]:
    """JSON schema of a method's config; ``name`` is a method, an alias or a short name.

    Raises:
        QuantmillError: no installed plugin has it.
    """
    from quantmill.stages.select import parse_method, unknown_method

    host = host or default_host()
    method = parse_method(name, host).method
    if method is None:
        raise QuantmillError(unknown_method(name, host))
    schema: dict[str, Any] = resolve(host.methods[method].config).model_json_schema()
    schema.get("properties", {}).pop("unknown", None)
    return schema
