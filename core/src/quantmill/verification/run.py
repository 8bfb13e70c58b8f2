"""Verifying a checkpoint: what is checked, in which order, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.architecture import TOKENIZERS
from quantmill.backend import Codec
from quantmill.checkpoint.containers import container_of
from quantmill.checkpoint.dtypes import torch_dtype
from quantmill.checkpoint.files import FolderSource
from quantmill.checkpoint.manifest import verify as verify_manifest
from quantmill.checkpoint.reader import TensorReader
from quantmill.conversion.view import Stored, stored_targets
from quantmill.findings import Finding, Findings, QuantmillError, Severity, declare
from quantmill.forms import Form
from quantmill.job import Job
from quantmill.registrations import resolve
from quantmill.stages.measure import as_float
from quantmill.stages.quantize import codec_of, decode_stored, member_headers, open_reader
from quantmill.stages.target import decisions_for
from quantmill.verification.forms import check_form

__all__ = ["CHECKS", "Verification", "verify_job"]

NO_MANIFEST = declare("QM-VERIFY-006", "There is no manifest to compare with", Severity.INFO)
DISAGREES = declare("QM-VERIFY-007", "Tensors and config disagree", Severity.WARNING)
NOT_FINITE = declare("QM-VERIFY-008", "A float tensor holds NaN or infinity")
NOT_TIED = declare("QM-VERIFY-009", "A tied weight is stored with other values")
NO_TOKENIZER = declare("QM-VERIFY-010", "There is no tokenizer that can be read", Severity.INFO)

CHECKS: Final = {
    "headers": "shapes, dtypes and names of all tensors",
    "config": "config and tensors agree",
    "checksums": "files have the SHA-256 of the manifest",
    "weights": "quantized weights decode; codes, scales, zero points, group index",
    "floats": "float tensors hold numbers",
    "ties": "tied weights agree",
}
"""What is looked at, in words."""
_BLOCK: Final = 1 << 22


@dataclass(slots=True)
class Verification:
    """What was looked at and what was found."""

    source: str
    checked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    """By check: how many things were looked at."""
    failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    """By check: how many errors and warnings there are."""
    findings: Findings = field(default_factory=Findings)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """There is no error."""
        return not self.findings.errors

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "source": self.source,
            "sound": self.sound,
            "checks": {
                name: {
                    "what": words,
                    "checked": self.checked[name],
                    "failed": self.failed[name],
                }
                for name, words in CHECKS.items()
            },
            "findings": self.findings.to_list(),
            "bytes": self.bytes,
            "seconds": self.seconds,
        }

    def add(self, check: str, findings: Any) -> None:
        """Count and keep findings of a check."""
        for item in findings:
            if item.severity is not Severity.INFO:
                self.failed[check] += 1
            self.findings.add(item)

    @contextmanager
    def collecting(self, check: str) -> Iterator[None]:
        """Errors inside become findings of a check."""
        try:
            yield
        except QuantmillError as error:
            self.add(check, error.findings)


def verify_job(job: Job) -> Verification:
    """Verify the checkpoint of a job, planned as far as that was possible.

    ``job.findings`` are what its headers and its config gave.
    """
    start = perf_counter()
    found = Verification(job.headers.source.describe(), bytes=job.headers.total_bytes)
    found.checked["headers"] = len(job.headers.tensors)
    for item in job.findings:
        if not item.code.startswith(("QM-MEMORY", "QM-METHOD", "QM-HOST", "QM-PLUGIN")):
            config = item.code.startswith(("QM-CONFIG", "QM-TARGET"))
            config |= item.data.get("check") == "config"
            found.add("config" if config else "headers", [item])
    _checksums(job, found)
    _tokenizer(job, found)
    if job.plan is None:
        found.seconds = perf_counter() - start
        return found
    stored = stored_targets(job)
    with open_reader(job.headers) as reader:
        _weights(job, stored, reader, found)
        _floats(job, stored, reader, found)
        _ties(job, reader, found)
    found.seconds = perf_counter() - start
    return found


def _tokenizer(job: Job, found: Verification) -> None:
    """Whether there is one: beside the weights, or in the file that holds them."""
    cause, fix = "none of its usual files is there", "add tokenizer.json"
    path = job.headers.source.describe()
    container = container_of(path, job.host)
    if container is None or container.tokenizer is None:
        there = any(job.headers.source.exists(name) for name in TOKENIZERS)
    else:
        cause = "the file holds none, or no framework that reads it is installed"
        fix = "convert the model again with its tokenizer"
        try:
            there = resolve(container.tokenizer)(Path(path)) is not None
        except QuantmillError as error:
            first = next(iter(error.findings))
            there, cause, fix = False, first.cause, first.fix
    if not there:
        found.add("headers", [NO_TOKENIZER("tokenizer", cause, fix)])


def _checksums(job: Job, found: Verification) -> None:
    source = job.headers.source
    folder = Path(source.describe())
    if not isinstance(source, FolderSource) or not folder.is_dir():
        return
    findings = list(verify_manifest(folder))
    if [item.code for item in findings] == ["QM-CKPT-060"]:
        why = "only quantmill writes one"
        found.add("checksums", [NO_MANIFEST(folder.name, why, "nothing to do")])
        return
    found.checked["checksums"] = len(job.headers.files)
    found.add("checksums", findings)


def _weights(
    job: Job, stored: Mapping[str, Stored], reader: TensorReader, found: Verification
) -> None:
    options = _options(job) if stored else {}
    for done, item in enumerate(stored.values(), 1):
        name = item.target.name
        job.advance(done, len(stored), name)
        found.checked["weights"] += 1
        with found.collecting("weights"):
            form = decode_stored(job, reader, item.target, item.selection)
            problems = list(check_form(form, name))
            found.add("weights", problems)
            if not problems:
                found.checked["config"] += 1
                found.add("config", _agreement(job, item, form, options.get(name, {})))


def _options(job: Job) -> dict[str, Mapping[str, Any]]:
    """What the config's own rules say differently for single modules."""
    assert job.architecture is not None
    modules = [as_float(item) for item in job.architecture.modules]
    before = Findings(job.findings)
    decisions = decisions_for(job, modules)
    job.findings = before
    return {item.module: item.options for item in decisions if item.options}


def _agreement(job: Job, item: Stored, form: Form, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the config describes the form: the form must fit under the config's own fields."""
    codec = codec_of(job, item.selection)
    if type(codec).fit.__func__ is Codec.fit.__func__:  # type: ignore[attr-defined]
        return
    config = item.selection.config
    fields = {key: getattr(config, key) for key in type(config).model_fields if key != "unknown"}
    wanted = type(config).normalise({**fields, **options})
    try:
        fit = type(codec).fit(form.regular(), item.target, wanted)
    except QuantmillError as error:
        yield DISAGREES(
            item.target.name,
            f"by the config it can't be as it is: {error.findings[0].cause}",
            "correct quantization_config: readers that believe it compute something else",
        )
        return
    regular = form.regular()
    for part, before, after in _sizes(regular, fit.form):
        if before != after:
            yield DISAGREES(
                item.target.name,
                f"it has {before} {part}, by the config it would have {after}",
                "correct quantization_config: readers that believe it compute something else",
            )
            return
    silent = {key for key, value in wanted.items() if value is None} | config.runtime_fields
    for key, value in fit.options.items():
        if key in wanted and key not in silent and _plain(wanted[key]) != _plain(value):
            yield DISAGREES(
                item.target.name,
                f"{key} is {value}, the config says {wanted[key]}",
                "correct quantization_config: readers that believe it compute something else",
            )


def _sizes(form: Form, fitted: Form) -> Iterator[tuple[str, Any, Any]]:
    """What a form has, and what it has where the config has it its way."""
    yield "bits", form.traits().get("bits"), fitted.traits().get("bits")
    scales = [getattr(item, "scale", None) for item in (form, fitted)]
    counts = [prod(scale.shape) if scale is not None else 0 for scale in scales]
    yield "scales", counts[0], counts[1]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _floats(
    job: Job, stored: Mapping[str, Stored], reader: TensorReader, found: Verification
) -> None:
    quantized = {
        header.name
        for item in stored.values()
        for header in member_headers(
            item.prefix, codec_of(job, item.selection), job.headers
        ).values()
    }
    for name, header in job.headers.tensors.items():
        if name in quantized:
            continue
        dtype = torch_dtype(header.dtype, name)
        if not dtype.is_floating_point or header.nbytes == 0:
            continue
        found.checked["floats"] += 1
        with found.collecting("floats"):
            bad = _count_bad(reader, name, header.shape)
            if bad:
                found.add(
                    "floats", [NOT_FINITE(name, f"{bad} of {header.numel} numbers", "get it again")]
                )


def _count_bad(reader: TensorReader, name: str, shape: tuple[int, ...]) -> int:
    if not shape:
        return int(not bool(torch.isfinite(reader.tensor(name).float())))
    width = 1
    for extent in shape[1:]:
        width *= extent
    bad = 0
    for _, block in reader.row_blocks(name, max(1, _BLOCK // max(1, width))):
        bad += int((~torch.isfinite(block.to(torch.float32))).sum())
    return bad


def _ties(job: Job, reader: TensorReader, found: Verification) -> None:
    """Two names of one weight, both stored, must hold the same values."""
    assert job.architecture is not None
    sources = {
        parameter.name: parameter.sources
        for module in job.architecture.modules
        for parameter in module.parameters.values()
    }
    for module in job.architecture.modules:
        weight = module.parameters.get("weight")
        if module.tied_to is None or weight is None or module.tied_to <= weight.name:
            continue  # Both name each other: one is enough.
        found.checked["ties"] += 1
        mine, theirs = weight.sources, sources.get(module.tied_to, ())
        if len(mine) != 1 or len(theirs) != 1 or mine == theirs:
            continue
        with found.collecting("ties"):
            a, b = reader.tensor(mine[0]), reader.tensor(theirs[0])
            if a.shape != b.shape or not _equal(a, b):
                found.add(
                    "ties",
                    [
                        NOT_TIED(
                            mine[0],
                            f"it is tied to {theirs[0]}, and their values differ",
                            "set tie_word_embeddings to false, or drop one of them",
                        )
                    ],
                )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(torch.float32), b.to(torch.float32))
