"""The sink that writes a checkpoint: encodes each form as it comes, keeps nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from quantmill.checkpoint.reader import TensorReader
from quantmill.checkpoint.writer import CheckpointWriter
from quantmill.forms import Form
from quantmill.job import Job, Selection
from quantmill.planning import Plan
from quantmill.registrations import resolve
from quantmill.stages.quantize import Sink, cast, codec_of, run
from quantmill.stages.table import stored_config
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target

__all__ = ["WriteReport", "write_checkpoint"]


@dataclass(frozen=True, slots=True)
class WriteReport:
    """A checkpoint that was written."""

    folder: Path
    """Or the file, of a format that holds a whole model in one."""
    files: dict[str, int]
    plan: Plan
    seconds: float
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Relative squared output error of each module by block, for calibrated methods."""

    @classmethod
    def of(cls, job: Job, folder: Path, seconds: float) -> WriteReport:
        """What ``job`` wrote into ``folder``, which may be a file, or the name of a split one."""
        assert job.plan is not None
        paths = [folder]
        if folder.is_dir():
            paths = sorted(folder.iterdir())
        elif not folder.exists():
            paths = sorted(folder.parent.glob(f"{folder.stem}-*-of-*{folder.suffix}"))
        files = {path.name: path.stat().st_size for path in paths}
        return cls(folder, files, job.plan, seconds, job.state.get("losses", {}))

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "folder": str(self.folder),
            "files": self.files,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "losses": {name: dict(found) for name, found in self.losses.items()},
            "plan": self.plan.to_dict(),
        }


_SHARD = 5 * 10**9


class CheckpointSink:
    """Writes what the engine makes under the names it had in the source."""

    def __init__(self, job: Job, writer: CheckpointWriter) -> None:
        self.job = job
        self.writer = writer

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        """Encode and write a quantized target and its module's bias."""
        architecture = self.job.architecture
        assert architecture is not None
        prefix = architecture.module_prefix(target.module)
        codec = codec_of(self.job, selection)
        encoded = codec.encode(form)
        if bias is not None:
            encoded["bias"] = bias
        for name, tensor in encoded.items():
            self.writer.add(f"{prefix}.{name}", tensor.detach().to("cpu").contiguous())
        self.writer.note(codec.annotate(form, f"{prefix}.{target.parameter}"))

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        """Copy float tensors under their own names, in the asked dtype.

        A stack of which some parts are quantized is written in parts.
        """
        architecture = self.job.architecture
        assert architecture is not None
        if parameter.part is not None and not self.broken.isdisjoint(parameter.sources):
            tensor = architecture.assemble(parameter, reader)
            local = parameter.name.rpartition(".")[2]
            self._add(f"{architecture.module_prefix(module)}.{local}", tensor, module)
            return
        for source in parameter.sources:
            if source not in self.written:
                self.written.add(source)
                self._add(source, reader.tensor(source), module)

    def _add(self, name: str, tensor: Tensor, module: ModuleInfo) -> None:
        if self.job.dtype and tensor.dtype.is_floating_point and not module.keep_float:
            tensor = cast(tensor, getattr(torch, self.job.dtype), name)
        self.writer.add(name, tensor)

    @cached_property
    def broken(self) -> set[str]:
        """Sources that hold a stack and of which parts are quantized."""
        assert self.job.plan is not None
        found: set[str] = set()
        for entry in self.job.plan.modules:
            if entry.action == "quantize" and entry.target is not None:
                for parameter in entry.target.module.parameters.values():
                    if parameter.part is not None:
                        found.update(parameter.sources)
        return found

    @property
    def written(self) -> set[str]:
        """Source names already written (a tensor may feed several parameters)."""
        store: set[str] = self.job.state.setdefault("written", set())
        return store


def write_checkpoint(
    job: Job, folder: Path, max_shard_bytes: int | None, engine: Callable[[Job, Sink], None] = run
) -> WriteReport:
    """Carry out ``job.plan`` into ``folder``, which appears only when all of it is written.

    Where ``job.container`` says so it is a file. Without ``max_shard_bytes`` a folder's files
    have at most 5 GB, and a file is not split. ``engine`` sends everything to a sink: the
    streaming one, or one that calibrates.
    """
    start = perf_counter()
    assert job.plan is not None and job.architecture is not None
    if job.container is not None:
        assert job.container.write is not None
        with resolve(job.container.write)(job, folder, max_shard_bytes) as sink:
            engine(job, sink)
            sink.commit()
        return WriteReport.of(job, folder, perf_counter() - start)
    config = {k: v for k, v in job.headers.config.items() if k != "quantization_config"}
    stored = stored_config(job) if job.selections else {}
    if stored:
        config["quantization_config"] = stored
    config = job.architecture.written_config(config, job.dtype)
    text = json.dumps(stored, sort_keys=True)
    manifest = {
        "method": ", ".join(job.selections) or "float",
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    # A quantized weight becomes a handful of tensors; an entry takes up to some 200 bytes.
    widest = max((len(codec_of(job, s).suffixes) for s in job.selections.values()), default=7)
    codec = codec_of(job, next(iter(job.selections.values()))) if job.selections else None
    room = len(job.headers.tensors) * max(7, widest) * 200
    noted = 0 if codec is None else codec.note_bytes
    notes = sum(noted + 3 * len(name) for name in job.headers.tensors) if noted else 0
    with CheckpointWriter(
        folder,
        stem=job.architecture.weights_stem,
        max_shard_bytes=max_shard_bytes or _SHARD,
        manifest=manifest,
        header_bytes=room,
        metadata=None if codec is None else codec.metadata,
        metadata_bytes=notes,
    ) as writer:
        engine(job, CheckpointSink(job, writer))
        writer.write_json("config.json", config)
        for selection in job.selections.values():
            if selection.method.quant_methods[:1] == (stored.get("quant_method"),):
                for name, content in selection.config.extra_files(stored).items():
                    writer.write_json(name, content)
                break
        for name in job.architecture.companions():
            source = job.headers.source
            writer.write_bytes(name, source.read(name, 0, source.size(name)))
        writer.commit()
    return WriteReport.of(job, folder, perf_counter() - start)
