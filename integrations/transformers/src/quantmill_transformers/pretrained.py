"""``from_pretrained`` through quantmill's stages: the loader is ours, the model transformers'.

Headers are read, a plan is made, everything wrong is reported at once; then weights stream. No
code of transformers' own loader takes part, so quantmill's bound on memory holds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as library_logging

from quantmill.api import make_job, prepare
from quantmill.architecture import UNUSED_TENSOR
from quantmill.findings import QuantmillError, Severity
from quantmill.host import Host
from quantmill.job import Job
from quantmill.loading import load_job
from quantmill.pretrained import CANT_HONOUR, Bar, locate_source
from quantmill_transformers.architecture import TransformersArchitecture
from quantmill_transformers.arguments import Arguments, read_arguments
from quantmill_transformers.claims import stored_config_of
from quantmill_transformers.configs import config_of_file, config_of_folder, locate_file
from quantmill_transformers.filling import NEW_PARAMETER
from quantmill_transformers.offload import PlacedSink
from quantmill_transformers.placement import first_device, normalise, place

if TYPE_CHECKING:
    from torch import nn

    from quantmill.architecture import Architecture

__all__ = ["load_pretrained"]

log = logging.getLogger("quantmill_transformers")
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def load_pretrained(
    cls: type[PreTrainedModel], source: Any, model_args: tuple[Any, ...], kwargs: Any, host: Host
) -> Any:
    """What ``cls.from_pretrained(source, *model_args, **kwargs)`` returns.

    Raises:
        FindingsError: every error found before loading, at once.
        QuantmillError: an argument can't be honoured; a weight can't be read or quantized.
    """
    if model_args:
        raise QuantmillError(
            CANT_HONOUR(
                "positional arguments", "they are for the model's __init__", "give them by name"
            )
        )
    asked = read_arguments(kwargs)
    job, model = _load(cls, source, asked, host)
    model.config.name_or_path = str(source)
    if asked.generation_config is not None and model.can_generate():
        made = type(model.generation_config).from_dict(asked.generation_config.to_dict())
        model.generation_config = made
    if asked.adapter is not None:
        model.load_adapter(
            asked.adapter, adapter_name=asked.adapter_name, adapter_kwargs=asked.adapter_options
        )
    _report(job, source)
    return (model, _loading_info(job)) if asked.loading_info else model


def _load(cls: type[PreTrainedModel], source: Any, asked: Arguments, host: Host) -> tuple[Job, Any]:
    device_map = normalise(asked.device_map)
    job = _job(cls, source, asked, host, first_device(device_map))
    job.options.placed = isinstance(device_map, str) or len(device_map) > 1
    prepare(job, allow_float=True)
    placement = place(job, device_map, asked.max_memory, asked.offload_folder)
    if placement.main != job.device:  # Nothing was left for the device that would be the first.
        job = _job(cls, source, asked, host, placement.main)
        job.options.placed = True
        prepare(job, allow_float=True)
    if not placement.dispatched:
        return job, load_job(job)
    sinks: list[PlacedSink] = []

    def make(job: Job, model: nn.Module, architecture: Architecture) -> PlacedSink:
        sinks.append(PlacedSink(job, model, architecture, placement, asked.offload_folder))
        return sinks[0]

    model = load_job(job, make)
    sinks[0].dispatch(buffers=asked.offload_buffers)
    return job, model


def _job(cls: type[PreTrainedModel], source: Any, asked: Arguments, host: Host, device: str) -> Job:
    in_file = asked.file is not None or Path(source).is_file()
    if in_file:
        where = locate_file(source, asked.file, asked.hub)
    else:
        where = locate_source(source, asked.hub, _FILES)
        config, model_kwargs = config_of_folder(cls, where, asked)
    options = dict(asked.options)
    job = make_job(
        where,
        asked.method,
        device=device,
        dtype=asked.dtype,
        skip=options.pop("skip", ()),
        include=options.pop("include", ()),
        host=host,
        progress=Bar(library_logging.tqdm),
        **options,
    )
    if in_file:
        config, model_kwargs = config_of_file(where, job.headers.config, asked)
    elif job.dtype is None and isinstance(asked.config, PreTrainedConfig) and config.dtype:
        # What a user wrote into a config of their own outranks the file's.
        wanted, there = str(config.dtype).removeprefix("torch."), job.headers.config
        if wanted != (there.get("dtype") or there.get("torch_dtype")):
            job.dtype = wanted
    stored = stored_config_of(job.headers.config)
    if stored is not None:
        job.headers.config["quantization_config"] = stored
    architecture = TransformersArchitecture(job.headers, cls, config=config, arguments=model_kwargs)
    architecture.source_name, architecture.dtype = "transformers", job.dtype
    job.architecture = architecture
    return job


def _report(job: Job, source: Any) -> None:
    assert job.plan is not None
    log.info(
        "%s was loaded by quantmill: %s quantized modules, %s",
        source,
        job.plan.totals["quantized"],
        "; ".join(job.plan.methods.values()),
    )
    for finding in job.findings:
        if finding.severity is not Severity.INFO:
            log.warning("%s", finding)


def _loading_info(job: Job) -> dict[str, Any]:
    """The dict of ``output_loading_info``; what would be an error here did not get this far."""

    def places(code: str) -> set[str]:
        return {item.where for item in job.findings if item.code == code}

    return {
        "missing_keys": places(NEW_PARAMETER.code),
        "unexpected_keys": places(UNUSED_TENSOR.code),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
