"""A live model into a file of a format that holds a whole one, such as GGUF.

What is quantized goes there with its exact values, as the modules hold them; what is float as it
is now, trained or not. Folders are written by the framework (``save_pretrained``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from quantmill.architecture import Architecture
from quantmill.checkpoint.containers import container_for
from quantmill.findings import Findings, QuantmillError, declare
from quantmill.job import Job, Progress
from quantmill.plain import save_state
from quantmill.registrations import resolve
from quantmill.stages.quantize import factory_of, open_reader
from quantmill.stages.validate import container_findings
from quantmill.stages.write import WriteReport
from quantmill.targeting.types import ModuleInfo, ParameterInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["save"]

STATE: Final = ".safetensors"

NO_JOB = declare("QM-SAVE-001", "A model was not loaded by quantmill, or is float")
NO_CONTAINER = declare("QM-SAVE-002", "No installed plugin writes files of this name")


class _Live(Architecture):
    """The architecture of a loaded model, whose tensors come from the model."""

    def __init__(self, base: Architecture, model: nn.Module) -> None:
        self._base, self._model = base, model
        self.source_name, self.dtype = base.source_name, base.dtype

    @property
    def modules(self) -> Sequence[ModuleInfo]:
        return self._base.modules

    @property
    def tied(self) -> Mapping[str, str]:
        return self._base.tied

    @property
    def default_dtype(self) -> str | None:
        return self._base.default_dtype

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._base.settings

    def module_prefix(self, module: ModuleInfo) -> str:
        return self._base.module_prefix(module)

    def build(self) -> nn.Module:
        return self._model

    def assemble(self, parameter: ParameterInfo, reader: Any) -> Tensor:
        module, _, local = parameter.name.rpartition(".")
        found: Tensor = getattr(self._model.get_submodule(module), local)
        return found.detach()


def save(
    model: nn.Module,
    path: str | Path,
    *,
    max_file_bytes: int | None = None,
    progress: Progress | None = None,
) -> WriteReport:
    """Write a quantized model into one file: ``model.gguf``, or ``module.safetensors``.

    A GGUF file stands alone. A ``.safetensors`` file holds the state of any quantized module and
    its config; :func:`quantmill.load_into` loads it into a fresh float module.

    Raises:
        FindingsError: every reason why the file can't hold the model, before anything is written.
        QuantmillError: the model is not of ``load``, no plugin writes such files, or it can't be
            written.
    """
    start, path = perf_counter(), Path(path)
    loaded: Job | None = getattr(model, "quantmill_job", None)
    if loaded is None or loaded.architecture is None or loaded.plan is None:
        raise QuantmillError(
            NO_JOB(
                type(model).__name__,
                "only quantized models of quantmill.load and quantize_model know what they hold",
                "save it with its framework, and quantize that folder into a file",
            )
        )
    if path.suffix == STATE:
        save_state(model, path)
        return WriteReport.of(loaded, path, perf_counter() - start)
    container = container_for(path, loaded.host)
    if container is None or container.write is None:
        known = sorted({s for c in loaded.host.containers if c.write for s in c.suffixes})
        fix = f"name a file that ends in {', '.join(known) or 'nothing known here'}"
        raise QuantmillError(NO_CONTAINER(str(path), "its ending is of no such format", fix))
    job = dataclasses.replace(
        loaded,
        container=container,
        architecture=_Live(loaded.architecture, model),
        options=dataclasses.replace(loaded.options, output=str(path)),
        progress=progress,
        findings=Findings(),
        state={},
    )
    job.findings.extend(container_findings(job))
    job.findings.raise_errors()
    with resolve(container.write)(job, path, max_file_bytes) as sink:
        _fill(job, model, sink)
        sink.commit()
    return WriteReport.of(job, path, perf_counter() - start)


def _fill(job: Job, model: nn.Module, sink: Any) -> None:
    assert job.plan is not None and job.architecture is not None
    planned = {
        (entry.target.name, entry.target.parameter): entry
        for entry in job.plan.modules
        if entry.action == "quantize" and entry.target is not None
    }
    modules = job.architecture.modules
    with open_reader(job.headers) as reader:
        for index, info in enumerate(modules):
            done = set()
            for local in info.parameters:
                entry = planned.get((info.name, local))
                if entry is None or entry.target is None or entry.method is None:
                    continue
                module = model.get_submodule(info.name)
                selection = job.selections[entry.method]
                form = factory_of(job, selection).form_of(module)
                if form is not None:
                    bias = getattr(module, "bias", None)
                    sink.put_form(selection, entry.target, form, bias)
                    done |= {local, "bias"}
            for local, parameter in info.parameters.items():
                tied = parameter.name in job.architecture.tied
                if local not in done and not tied and (parameter.sources or local != "weight"):
                    sink.put_tensor(info, parameter, reader)
            job.advance(index + 1, len(modules), info.name)
