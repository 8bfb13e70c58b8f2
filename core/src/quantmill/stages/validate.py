"""Stage 3, validation: everything that stands in the way, at once, before a weight is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from quantmill.architecture import TOKENIZERS
from quantmill.checkpoint.containers import container_of
from quantmill.devices import cuda_there
from quantmill.findings import Finding, QuantmillError, Severity, declare
from quantmill.hook_calls import accuse
from quantmill.job import Job, Selection
from quantmill.registrations import Validator, resolve
from quantmill.requirements import missing_requirements

__all__ = ["available_memory", "container_findings", "core_findings", "validate"]

DEVICE_UNKNOWN = declare("QM-DEVICE-001", "The device does not exist here")
DEVICE_UNSUPPORTED = declare("QM-DEVICE-002", "The method can't compute on this device")
DEVICE_TOO_OLD = declare("QM-DEVICE-003", "The device's compute capability is too low")
OUT_OF_MEMORY = declare("QM-MEMORY-001", "The model does not fit into the memory there is")
NO_SPACE = declare("QM-DISK-001", "The output does not fit on the disk")
NO_TOKENIZER = declare(
    "QM-SOURCE-001", "A language model that is to be written has no tokenizer", Severity.INFO
)
OUTPUT_EXISTS = declare("QM-DISK-002", "The file to be written is there already")
NOT_SERIALISABLE = declare("QM-METHOD-001", "The method can't be written to a checkpoint")
NEEDS_CALIBRATION = declare("QM-METHOD-002", "The method needs calibration data")
CALIBRATION_NOTE = declare("QM-METHOD-006", "The method will need calibration data", Severity.INFO)
CANT_LOAD_STORED = declare("QM-METHOD-003", "The method can't load quantized checkpoints")
OPTIONAL_MISSING = declare(
    "QM-METHOD-004", "An optional library of a method is missing", Severity.WARNING, fallback=True
)
READ_ONLY = declare("QM-METHOD-008", "The method reads checkpoints and makes none")
ALREADY_QUANTIZED = declare("QM-METHOD-005", "The source is quantized already")


def validate(job: Job) -> None:
    """Ask every validator; add what they find to ``job.findings``."""
    with job.stage("validate"):
        for answer in job.host.hook.quantmill_validate(job=job):
            job.findings.extend(answer or ())
        if job.options.strict:
            job.findings = job.findings.strict()
            if job.plan is not None:
                job.plan.findings = job.findings


def core_findings(job: Job) -> Iterator[Finding]:
    """The core's own checks, then the registered validators."""
    yield from job.host.findings({item.plugin for item in job.selections.values()})
    yield from _device(job)
    yield from _methods(job)
    yield from _memory(job)
    yield from _disk(job)
    yield from _tokenizer(job)
    yield from container_findings(job)
    used = {item.method.name for item in job.selections.values()}
    for validator in job.host.validators:
        if not validator.methods or used & set(validator.methods):
            yield from _ask(job, validator)


def _ask(job: Job, validator: Validator) -> list[Finding]:
    try:
        return list(resolve(validator.check)(job) or ())
    except QuantmillError:
        raise
    except Exception as error:  # noqa: BLE001 it is known whose it is
        return [accuse(job.host, job, error, "quantmill_validators")[1]]


def _device(job: Job) -> Iterator[Finding]:
    import torch

    kind = job.device.partition(":")[0]
    known = kind in ("cpu", "meta")
    if kind == "cuda":
        known = cuda_there(job.device)
    if kind not in ("cpu", "meta", "cuda"):
        known = hasattr(torch, kind) and getattr(torch, kind).is_available()
    if not known:
        yield DEVICE_UNKNOWN(job.device, f"torch sees no {job.device} device here", "use cpu")
        return
    for item in job.selections.values():
        devices = item.method.capabilities.devices
        if kind not in devices:
            yield DEVICE_UNSUPPORTED(
                item.label,
                f"{item.method.name} computes on {', '.join(devices)}, not on {kind}",
                f"use one of {', '.join(devices)}",
            )
        for requirement in item.method.requirements:
            least = requirement.compute_capability
            if kind == "cuda" and least and torch.cuda.get_device_capability(job.device) < least:
                have = torch.cuda.get_device_capability(job.device)
                yield DEVICE_TOO_OLD(
                    item.label,
                    f"needs compute capability {least[0]}.{least[1]}, this one has"
                    f" {have[0]}.{have[1]}. {requirement.why}",
                    "use a newer device or another method",
                )


def _methods(job: Job) -> Iterator[Finding]:
    for item in job.selections.values():
        able = item.method.capabilities
        if job.prequantized and not able.prequantized:
            yield CANT_LOAD_STORED(
                item.label,
                f"{item.method.name} can't load checkpoints that are quantized",
                "load the float checkpoint and quantize it on the fly",
            )
        makes = able.on_the_fly or able.calibrated
        anew = not job.prequantized and not job.options.exact
        if anew and not makes:
            yield READ_ONLY(
                item.label,
                f"{item.method.name} is a format that is read and not made",
                "take a method that quantizes: see `quantmill doctor`",
            )
        elif anew and not able.on_the_fly and job.options.calibration is None:
            code = CALIBRATION_NOTE if job.options.planning else NEEDS_CALIBRATION
            yield code(
                item.label,
                f"{item.method.name} quantizes with calibration data only",
                "give a text: --calibration FILE, or calibration= in Python",
            )
        if job.options.output:
            yield from _writable(job, item)
        for requirement, there in missing_requirements(item.method.requirements):
            if requirement.optional:
                wanted = f"{requirement.distribution}{requirement.versions}"
                yield OPTIONAL_MISSING(
                    item.label,
                    f"{wanted}: {there}. {requirement.why}",
                    f'pip install "{wanted}"',
                )
    if job.options.output and job.prequantized:
        yield ALREADY_QUANTIZED(
            "source",
            "the source's weights are quantized, and quantizing them again would add error",
            "give the float checkpoint as the source",
        )


def _writable(job: Job, item: Selection) -> Iterator[Finding]:
    """Whether a method's weights can be written to what the output is."""
    name, output = item.method.name, str(job.options.output)
    if job.container is not None:
        if job.container.write is None:
            cause = f"files of {job.container.name} are only read here"
            yield NOT_SERIALISABLE(item.label, cause, "name a folder as the output")
        elif name not in job.container.methods:
            others = ", ".join(job.container.methods)
            cause = f"a file of {job.container.name} can't hold what {name} makes"
            fix = f"take {others}, or name a folder as the output"
            yield NOT_SERIALISABLE(item.label, cause, fix)
    elif not item.method.capabilities.serialisable:
        fix = "choose a serialisable method: see `quantmill doctor`"
        for container in job.host.containers:
            if container.write is not None and name in container.methods:
                fix = f"name a file as the output: {output}{container.suffixes[0]}"
        yield NOT_SERIALISABLE(item.label, f"{name} has no disk layout for a folder", fix)


def container_findings(job: Job) -> Iterator[Finding]:
    """Why the file that ``job`` is to write can't be, or can't hold what it makes."""
    if job.container is None or job.container.write is None or not job.options.output:
        return
    if Path(job.options.output).exists():
        cause = "there is a file or folder of this name"
        yield OUTPUT_EXISTS(job.options.output, cause, "choose a new name, or remove it")
    found: Iterable[Finding] = resolve(job.container.write).check(job)
    yield from found


def available_memory(device: str) -> int | None:
    """Free bytes on a device, or None where nobody can tell or there is no such device."""
    if device.startswith("cuda"):
        import torch

        if not cuda_there(device):
            return None
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _memory(job: Job) -> Iterator[Finding]:
    if job.plan is None or job.options.output or job.options.placed:
        return
    peak = job.plan.totals["peak_bytes"]
    kind = job.device.partition(":")[0]
    allowed = (job.options.max_memory or {}).get(job.device)
    if allowed is None:
        allowed = (job.options.max_memory or {}).get(kind)
    free = available_memory(job.device)
    limits = [(allowed, "max_memory allows"), (free, "free are")]
    for limit, words in limits:
        if limit is not None and peak > limit:
            yield OUT_OF_MEMORY(
                job.device,
                f"loading needs {peak:,} bytes at its peak, {words} {limit:,}",
                "take a method with fewer bits: `quantmill plan --memory`",
            )
            return


def _tokenizer(job: Job) -> Iterator[Finding]:
    """Of a folder into a folder: formats of one file say themselves what they lack."""
    source, config = job.headers.source, job.headers.config
    if not job.options.output or job.container is not None:
        return
    if container_of(source.describe(), job.host) is not None:
        return
    language = config.get("text_config", config)
    if not isinstance(language, Mapping) or "vocab_size" not in language:
        return
    if not any(source.exists(name) for name in TOKENIZERS):
        yield NO_TOKENIZER(
            source.describe(),
            "it has no file of a tokenizer, and what is written will have none",
            "add the tokenizer's files to either folder to work with text",
        )


def _disk(job: Job) -> Iterator[Finding]:
    if job.plan is None or not job.options.output:
        return
    folder = Path(job.options.output).absolute().parent
    while not folder.exists():
        folder = folder.parent
    needed = job.plan.totals["bytes_after"]
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield NO_SPACE(
            job.options.output,
            f"{needed:,} bytes are needed, {free:,} are free",
            "free space or choose another folder",
        )
