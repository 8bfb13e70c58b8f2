"""``from_pretrained`` through quantmill's stages: the loader is ours, the model transformers'.

Headers are read, a plan is made, everything wrong is reported at once; then weights stream. No
code of transformers' own loader takes part, so quantmill's bound on memory holds.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as library_logging

from quantmill.api import make_job, prepare
from quantmill.architecture import UNUSED_TENSOR
from quantmill.findings import QuantmillError, Severity
from quantmill.host import Host
from quantmill.job import Job
from quantmill.loading import load_job
from quantmill_transformers.architecture import NEW_PARAMETER, TransformersArchitecture
from quantmill_transformers.arguments import CANT_HONOUR, Arguments, read_arguments
from quantmill_transformers.claims import stored_config_of

__all__ = ["load_pretrained"]

log = logging.getLogger("quantmill_transformers")


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
    job = _job(cls, source, asked, host)
    prepare(job, allow_float=True)
    model: Any = load_job(job)
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


def _job(cls: type[PreTrainedModel], source: Any, asked: Arguments, host: Host) -> Job:
    place = _place(source, asked.hub)
    config, model_kwargs = _config(cls, place, asked)
    options = dict(asked.options)
    job = make_job(
        place,
        asked.method,
        dtype=asked.dtype,
        skip=options.pop("skip", ()),
        include=options.pop("include", ()),
        host=host,
        progress=_Bar(),
        **options,
    )
    if job.dtype is None and isinstance(asked.config, PreTrainedConfig) and config.dtype:
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


def _place(source: Any, hub: dict[str, Any]) -> str:
    """The folder, or the Hub id with its revision."""
    where = {name: value for name, value in hub.items() if name != "subfolder"}
    subfolder = hub.get("subfolder", "")
    if Path(source).is_dir():
        return str(Path(source) / subfolder)
    if not subfolder and not where.keys() - {"revision"}:
        revision = where.get("revision")
        return f"{source}@{revision}" if revision else str(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    if subfolder:
        patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
    folder = snapshot_download(str(source), allow_patterns=patterns, **where)
    return str(Path(folder) / subfolder)


def _config(cls: type[PreTrainedModel], place: str, asked: Arguments) -> tuple[Any, dict[str, Any]]:
    """The typed config of the model, and what the rest of the arguments gives its class."""
    if isinstance(asked.config, PreTrainedConfig):
        config, rest = copy.deepcopy(asked.config), asked.rest
    else:
        name, _, revision = (place, "", "") if Path(place).is_dir() else place.partition("@")
        config_class: Any = cls.config_class
        config, rest = config_class.from_pretrained(
            name if asked.config is None else asked.config,
            return_unused_kwargs=True,
            **({"revision": revision} if revision else {}),
            **asked.rest,
        )
    for name, value in asked.implementations.items():
        setattr(config, f"_{name}", value)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config, rest


class _Bar:
    """The library's own progress bar, which its settings switch off."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._done = 0  # Switched off, the library's bar has no count of its own.

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            self._bar = library_logging.tqdm(
                total=total, desc="Loading weights with quantmill", unit="B", unit_scale=True
            )
        self._bar.update(done - self._done)
        self._done = done
        if done >= total:
            self._bar.close()


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
