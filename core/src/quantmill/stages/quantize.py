"""Stage 4, weight quantization: the one streaming engine, into whatever sink is given.

Tensors are visited in the order of the checkpoint's files. A target's weight streams by row
blocks through two buffers into its form; everything else is read straight into its final memory.
What the sink is (a live model, a checkpoint) the engine does not know.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quantmill.backend import Codec, LinearFactory, NonFiniteWeight, Quantizer, block_bytes
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.checkpoint.reader import TensorReader
from quantmill.findings import Findings, QuantmillError, Severity, declare
from quantmill.heap import give_back
from quantmill.job import Job, Selection
from quantmill.registrations import resolve
from quantmill.stages.weights import StreamedWeight, on_device
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target

if TYPE_CHECKING:
    from quantmill.forms import Form

__all__ = [
    "Sink",
    "cast",
    "decode_stored",
    "keep_non_finite",
    "open_reader",
    "run",
    "run_modules",
]

NOT_FINITE = declare("QM-WEIGHT-001", "A weight holds NaN or infinity")
NOT_FINITE_KEPT = declare(
    "QM-WEIGHT-002",
    "A weight holds NaN or infinity and is kept float",
    Severity.WARNING,
    fallback=True,
)
OVERFLOW = declare("QM-WEIGHT-003", "A value does not fit into the asked dtype")
_HELD, _LARGE = 128 << 20, 64 << 20
"""Bytes read until what their work left free goes back to the system, and those of a module before
which it does so in any case."""


class Sink(Protocol):
    """Where the engine puts what it makes."""

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        """Take a quantized target, with the module's bias if it has one."""
        ...

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        """Take a tensor that stays float."""
        ...


def planned_form(job: Job, selection: Selection, target: Target, dtype: torch.dtype) -> Form | None:
    """The form that a planned target has or will have, on the meta device."""
    assert job.architecture is not None
    if not job.prequantized:
        return quantizer_of(job, selection).abstract(target, dtype)
    codec = codec_of(job, selection)
    members = member_headers(job.architecture.module_prefix(target.module), codec, job.headers)
    return codec.describe(members, target, dtype)


def quantizer_of(job: Job, selection: Selection) -> Quantizer[Any]:
    """The quantizer of a selection, one per job."""
    made: Quantizer[Any] = _cached(
        job,
        ("quantizer", selection.label),
        lambda: resolve(selection.method.quantizer)(
            selection.config, device=torch.device(job.device), kernels=job.kernels
        ),
    )
    return made


def codec_of(job: Job, selection: Selection) -> Codec[Any]:
    """The codec of a selection, one per job."""
    made: Codec[Any] = _cached(
        job,
        ("codec", selection.label),
        lambda: resolve(selection.method.codec)(selection.config),
    )
    return made


def factory_of(job: Job, selection: Selection) -> LinearFactory[Any]:
    """The linear factory of a selection, one per job."""
    reference = selection.method.linear or "quantmill.linear:FormLinearFactory"
    made: LinearFactory[Any] = _cached(
        job,
        ("factory", selection.label),
        lambda: resolve(reference)(
            selection.config,
            codec_of(job, selection),
            job.kernels,
            device=job.device.partition(":")[0],
            dtype=job.compute_dtype,
        ),
    )
    return made


def _cached(job: Job, key: tuple[str, str], make: Any) -> Any:
    store = job.state.setdefault("quantmill", {})
    if key not in store:
        store[key] = make()
    return store[key]


def member_headers(
    prefix: str, codec: Codec[Any], headers: CheckpointHeaders
) -> dict[str, TensorHeader]:
    """The checkpoint's tensors of one module in a codec's layout, by name relative to it."""
    found = {}
    for suffix in codec.suffixes:
        header = headers.tensors.get(f"{prefix}.{suffix}" if prefix else suffix)
        if header is not None:
            found[suffix] = header
    return found


def run(job: Job, sink: Sink) -> None:
    """Carry out ``job.plan``: every module of it reaches the sink exactly once.

    Raises:
        QuantmillError: a weight can't be read or quantized; nothing has been committed then.
    """
    architecture = job.architecture
    assert architecture is not None
    total = sum(header.nbytes for header in job.headers.tensors.values())
    done = 0
    with job.stage("quantize"), open_reader(job.headers, job.device) as reader:
        for module in run_modules(job, sink, architecture.modules, reader):
            done += _source_bytes(module, job)
            job.advance(min(done, total), total, module.name)
        job.advance(total, total, "done")
    give_back()


def open_reader(headers: CheckpointHeaders, device: str = "cpu") -> TensorReader:
    """What reads a source's tensors for a device: its own reader, where it has one."""
    own = getattr(headers.source, "reader", None)
    if own is None:
        there = torch.device(device)
        gpu = there.type == "cuda"
        # A copy out of the page cache is what takes time then, and one thread is slower at it
        # than the bus.
        threads = min(8, max(1, (os.cpu_count() or 1) // 2)) if gpu else 1
        return TensorReader(headers, buffer_bytes=block_bytes(there), pinned=gpu, threads=threads)
    made: TensorReader = own(headers)
    return made


def run_modules(
    job: Job,
    sink: Sink,
    modules: Iterable[ModuleInfo],
    reader: TensorReader,
    forms: Mapping[str, Form | None] | None = None,
) -> Iterator[ModuleInfo]:
    """Send ``modules`` to the sink in the order of the checkpoint's files; yields each when done.

    ``forms`` (by target name) were made before, by calibration, and are not made again; None
    stands for a target that stays float after all.
    """
    plan, architecture = job.plan, job.architecture
    assert plan is not None and architecture is not None
    planned = _planned(job)

    def place(module: ModuleInfo) -> tuple[str, int]:
        return job.headers.place(header.name for header, _ in _stored(module, job))

    ordered = sorted(modules, key=place)
    waiting = [
        target
        for module in ordered
        for target, _ in planned.get(module.name, [])
        if forms is None or target.name not in forms
    ]
    after = dict(zip(map(_key, waiting), waiting[1:], strict=False))
    read = 0
    for module in ordered:
        size = _source_bytes(module, job)
        if read + size >= _HELD or size >= _LARGE:
            give_back()
            read = 0
        read += size
        made = set()
        for target, selection in planned.get(module.name, []):
            if forms is not None and target.name in forms:
                form = forms[target.name]
                if form is None:
                    continue
                bias = _bias(job, reader, target)
                sink.put_form(selection, target, form, bias)
            elif not _one(job, reader, sink, target, selection, after.get(_key(target))):
                continue
            made.add(target.parameter)
        for local, parameter in module.parameters.items():
            if local in made or not parameter.sources or parameter.name in architecture.tied:
                continue
            if made and local == "bias":
                continue
            sink.put_tensor(module, parameter, reader)
        yield module


def _planned(job: Job) -> dict[str, list[tuple[Target, Selection]]]:
    """Targets and their selections by module name; made once per plan."""
    assert job.plan is not None

    def make() -> dict[str, list[tuple[Target, Selection]]]:
        planned: dict[str, list[tuple[Target, Selection]]] = {}
        for entry in job.plan.modules if job.plan is not None else ():
            if entry.action == "quantize" and entry.target is not None:
                selection = job.selections[entry.method or next(iter(job.selections))]
                planned.setdefault(entry.target.name, []).append((entry.target, selection))
        return planned

    found: dict[str, list[tuple[Target, Selection]]] = _cached(job, ("planned", ""), make)
    return found


def _bias(job: Job, reader: TensorReader, target: Target) -> Tensor | None:
    assert job.architecture is not None
    info = target.module.parameters.get("bias")
    if info is None or not info.sources:
        return None
    return job.architecture.assemble(info, reader).to(job.device)


def _key(target: Target) -> tuple[str, str]:
    return target.name, target.parameter


def _one(
    job: Job,
    reader: TensorReader,
    sink: Sink,
    target: Target,
    selection: Selection,
    following: Target | None,
) -> bool:
    """Quantize or decode one target. False when it stays float after all. The one that comes next
    begins to be read while this one is put into its place."""
    architecture = job.architecture
    assert architecture is not None and job.plan is not None
    if job.prequantized:
        form = decode_stored(job, reader, target, selection)
    else:
        weight = _streamed(job, reader, target)
        try:
            form = job.host.hook.quantmill_quantize(
                job=job, selection=selection, target=target, weight=weight
            )
        except NonFiniteWeight as error:
            keep_non_finite(job, error, weight.shape)
            return False
        if following is not None and weight.multiple:
            _streamed(job, reader, following).begin(weight.multiple)
    bias = _bias(job, reader, target)
    sink.put_form(selection, target, form, bias)
    return True


def _streamed(job: Job, reader: TensorReader, target: Target) -> StreamedWeight:
    assert job.plan is not None
    dtype = getattr(torch, job.plan.dtype) if job.dtype is not None else None
    return StreamedWeight(reader, target, job.architecture, torch.device(job.device), dtype)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in another float dtype.

    Raises:
        QuantmillError: a finite value is beyond the dtype's largest.
    """
    made = tensor.to(dtype)
    # Of the dtypes of weights only this one has a shorter range than its fellows.
    if dtype == torch.float16 and tensor.dtype != dtype and not bool(torch.isfinite(made).all()):
        beyond = tensor[torch.isfinite(tensor) & ~torch.isfinite(made)]
        if beyond.numel():
            value = float(beyond.abs().max())
            raise QuantmillError(
                OVERFLOW(name, f"a value of {value:.4g} is beyond float16", "take bfloat16")
            )
    return made


def decode_stored(job: Job, reader: TensorReader, target: Target, selection: Selection) -> Form:
    """The form of a target that the checkpoint holds quantized, on the job's device.

    Raises:
        QuantmillError: its tensors can't be read, or contradict each other.
    """
    assert job.architecture is not None and job.plan is not None
    codec = codec_of(job, selection)
    members = member_headers(job.architecture.module_prefix(target.module), codec, job.headers)
    tensors: Mapping[str, Tensor] = {
        name: _resident(reader, header, job.device) for name, header in members.items()
    }
    return codec.decode(tensors, target, getattr(torch, job.plan.dtype))


def keep_non_finite(job: Job, error: NonFiniteWeight, shape: tuple[int, ...]) -> None:
    """Apply the job's policy to NaN or infinity in a weight of ``shape``.

    Raises:
        QuantmillError: unless the policy is to keep such modules float; a finding says so then.
    """
    if job.options.non_finite != "keep":
        raise QuantmillError(
            NOT_FINITE(
                error.name,
                error.cause(shape),
                'repair the checkpoint, or keep such modules float with non_finite="keep"',
            )
        ) from None
    job.findings.add(NOT_FINITE_KEPT(error.name, error.cause(shape), "repair the checkpoint"))
    if job.options.strict:
        Findings(job.findings).strict().raise_errors()


def _resident(reader: TensorReader, header: TensorHeader, device: str) -> Tensor:
    if device == "cpu":
        return reader.mapped(header.name)
    return on_device(reader, header.name, torch.device(device))


def _stored(module: ModuleInfo, job: Job) -> list[tuple[TensorHeader, float]]:
    """The tensors of a module in the checkpoint, each once, and how much of each is the module's;
    looked up once per job."""
    architecture = job.architecture
    assert architecture is not None

    def make() -> list[tuple[TensorHeader, float]]:
        found: dict[str, tuple[TensorHeader, float]] = {}
        for parameter in module.parameters.values():
            for source in parameter.sources:
                header = job.headers.tensors.get(source)
                if header is None:
                    continue
                share = 1.0
                if parameter.part is not None:
                    share = prod(parameter.shape) / max(1, prod(header.shape))
                found[source] = header, share
        for target, selection in _planned(job).get(module.name, []) if job.prequantized else ():
            prefix = architecture.module_prefix(target.module)
            for header in member_headers(prefix, codec_of(job, selection), job.headers).values():
                found.setdefault(header.name, (header, 1.0))
        return list(found.values())

    there: list[tuple[TensorHeader, float]] = _cached(job, ("stored", module.name), make)
    return there


def _source_bytes(module: ModuleInfo, job: Job) -> int:
    return sum(round(header.nbytes * share) for header, share in _stored(module, job))
