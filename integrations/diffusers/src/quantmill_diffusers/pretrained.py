"""``ModelMixin.from_pretrained`` through quantmill's stages: the loader is ours.

Headers are read, a plan is made, everything wrong is reported at once; then weights stream. No
code of diffusers' own loader takes part, so quantmill's bound on memory holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as library_logging

from quantmill.api import make_job, prepare
from quantmill.architecture import MISSING_TENSOR, UNUSED_TENSOR
from quantmill.findings import Finding, QuantmillError, Severity
from quantmill.host import Host
from quantmill.job import Job
from quantmill.loading import load_job
from quantmill.pretrained import (
    CANT_HONOUR,
    HUB,
    Bar,
    locate_source,
    options_of,
    read_dtype,
    refuse,
)
from quantmill_diffusers.architecture import DiffusersArchitecture

__all__ = ["load_pretrained"]

log = logging.getLogger("quantmill_diffusers")
_FILES: Final = ("*.safetensors", "*.json")


def _given(value: Any) -> bool:
    return value is not None and value is not False and value != {}


_REFUSED: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "flashpack_kwargs": (_given, "weights are read from safetensors files"),
    "from_flax": (_given, "only weights of PyTorch are read"),
    "ignore_mismatched_sizes": (_given, "a tensor of a wrong shape is an error"),
    "parallel_config": (_given, "weights are not distributed over processes"),
    "use_flashpack": (_given, "weights are read from safetensors files"),
    "use_safetensors": (lambda value: value is False, "pickled weights are never read"),
}
# They change nothing here: no weight is initialised twice, nothing is pickled, files are mapped;
# the last two are about offloading, which a device_map would have to ask for.
_WITHOUT_MEANING: Final = (
    "disable_mmap",
    "low_cpu_mem_usage",
    "mirror",
    "offload_state_dict",
    "max_memory",
    "offload_folder",
)


def load_pretrained(
    cls: type[ModelMixin], source: Any, kwargs: Mapping[str, Any], host: Host
) -> Any:
    """What ``cls.from_pretrained(source, **kwargs)`` returns.

    Raises:
        FindingsError: every error found before loading, at once.
        QuantmillError: an argument can't be honoured; a weight can't be read or quantized.
    """
    rest = dict(kwargs)
    problems: list[Finding] = []
    refuse(rest, _REFUSED, problems)
    for name in _WITHOUT_MEANING:
        rest.pop(name, None)
    hub = {name: value for name in HUB if (value := rest.pop(name, None)) not in (None, False, "")}
    # The library's default is float32, whatever the checkpoint holds.
    torch_dtype, dtype = rest.pop("torch_dtype", None), rest.pop("dtype", None)
    name = read_dtype(dtype if dtype is not None else torch_dtype, problems) or "float32"
    device = _device(rest.pop("device_map", None), problems)
    options = options_of(rest.pop("quantmill_options", None), problems)
    info = bool(rest.pop("output_loading_info", False))
    method, variant = rest.pop("quantization_config", None), rest.pop("variant", None)
    if problems:
        raise QuantmillError(*problems)
    where = locate_source(source, hub, _FILES)
    if variant is not None:
        where = _variant(where, str(variant))
    job = make_job(
        where,
        method,
        device=device,
        dtype=name,
        skip=options.pop("skip", ()),
        include=options.pop("include", ()),
        host=host,
        progress=Bar(library_logging.tqdm),
        **options,
    )
    # What else was given is for the class, as in the library.
    job.headers.config.update(rest)
    architecture = DiffusersArchitecture(job.headers, _class_of(cls, job))
    architecture.source_name, architecture.dtype = "diffusers", job.dtype
    job.architecture = architecture
    prepare(job, allow_float=True)
    model: Any = load_job(job)
    model.register_to_config(_name_or_path=str(source))
    for finding in job.findings:
        if finding.severity is not Severity.INFO:
            log.warning("%s", finding)
    return (model, _loading_info(job)) if info else model


def _class_of(cls: type[ModelMixin], job: Job) -> type[ModelMixin]:
    """``ModelMixin`` itself stands for what the config names."""
    import diffusers

    if cls is not ModelMixin:
        return cls
    found: type[ModelMixin] = getattr(diffusers, str(job.headers.config.get("_class_name")), cls)
    return found


def _device(device_map: Any, problems: list[Finding]) -> str:
    """The one device of a ``device_map``."""
    if device_map is None:
        return "cpu"
    values = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    only = next(iter(values)) if len(values) == 1 else None
    if only is not None and str(only) not in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
        "disk",
    ):
        device = f"cuda:{only}" if isinstance(only, int) else str(only)
        try:
            torch.device(device)
        except RuntimeError:
            pass
        else:
            return device
    problems.append(
        CANT_HONOUR(
            "device_map",
            f"{device_map!r} is not one device, and components are loaded whole",
            "give one device; enable_model_cpu_offload() moves whole components afterwards",
        )
    )
    return "cpu"


def _variant(where: str, variant: str) -> str:
    """The file of a variant, such as ``fp16``."""
    file = Path(where) / f"diffusion_pytorch_model.{variant}.safetensors"
    if file.is_file():
        return str(file)
    raise QuantmillError(
        CANT_HONOUR(
            "variant",
            f"there is no {file.name}: only variants in one file are read",
            "leave variant out, or save the component without shards",
        )
    )


def _loading_info(job: Job) -> dict[str, Any]:
    """The dict of ``output_loading_info``."""

    def places(code: str) -> list[str]:
        return [item.where for item in job.findings if item.code == code]

    return {
        "missing_keys": places(MISSING_TENSOR.code),
        "unexpected_keys": places(UNUSED_TENSOR.code),
        "mismatched_keys": [],
        "error_msgs": [],
    }
