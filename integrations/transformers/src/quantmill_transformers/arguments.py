"""The arguments of ``from_pretrained``: each is honoured, without meaning here, or refused.

Nothing is ignored in silence: what the loader can't do is a finding, and all of them are reported
at once, before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantmill.findings import Finding, QuantmillError
from quantmill.pretrained import HUB, options_of, read_dtype, refuse

__all__ = ["Arguments", "read_arguments"]

# They change nothing here: no weight is initialised twice, nothing is pickled, files are mapped.
_WITHOUT_MEANING = (
    "_commit_hash",
    "_fast_init",
    "_from_auto",
    "_from_pipeline",
    "code_revision",
    "disable_mmap",
    "from_flax",
    "from_tf",
    "low_cpu_mem_usage",
    "mirror",
    "offload_state_dict",
    "tqdm_class",
    "trust_remote_code",
    "weights_only",
)


def _given(value: Any) -> bool:
    return value is not None and value is not False


_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "device_mesh": (_given, "weights are not distributed over a mesh"),
    "distributed_config": (_given, "weights are not distributed over processes"),
    "fusion_config": (_given, "modules are not fused while loading"),
    "ignore_mismatched_sizes": (_given, "a tensor of a wrong shape is an error"),
    "kernel_config": (_given, "kernels come from quantmill's registry"),
    "key_mapping": (_given, "names are mapped by the architecture's own rules"),
    "proxies": (_given, "proxies come from the environment (HTTPS_PROXY)"),
    "state_dict": (_given, "weights stream from files"),
    "tp_plan": (_given, "weights are not distributed over processes"),
    "tp_size": (_given, "weights are not distributed over processes"),
    "use_kernels": (_given, "kernels come from quantmill's registry"),
    "use_safetensors": (lambda value: value is False, "pickled weights are never read"),
    "variant": (_given, "only the main files of a checkpoint are read"),
}


@dataclass(slots=True)
class Arguments:
    """What a call asks for, sorted."""

    method: Any = None
    """METHOD as the user gave it; None to take what the checkpoint says."""
    config: Any = None
    dtype: str | None = None
    """A name, or None for the checkpoint's own."""
    device_map: Any = None
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: str | None = None
    offload_buffers: bool = False
    file: str | None = None
    """A file that holds the whole checkpoint, in the source or beside it."""
    hub: dict[str, Any] = field(default_factory=dict)
    """Those of :data:`quantmill.pretrained.HUB` that were given."""
    implementations: dict[str, Any] = field(default_factory=dict)
    """``attn_implementation`` and ``experts_implementation``."""
    generation_config: Any = None
    loading_info: bool = False
    adapter: Any = None
    """Folder or Hub id of an adapter to put on the model."""
    adapter_name: str = "default"
    adapter_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Options for :func:`quantmill.load`."""
    rest: dict[str, Any] = field(default_factory=dict)
    """For the config's class, and what that leaves for the model's."""


def read_arguments(kwargs: Mapping[str, Any]) -> Arguments:
    """Sort the keyword arguments of a ``from_pretrained`` call.

    Raises:
        QuantmillError: some can't be honoured.
    """
    rest = dict(kwargs)
    problems: list[Finding] = []
    refuse(rest, _REFUSED, problems)
    for name in _WITHOUT_MEANING:
        rest.pop(name, None)
    hub = {name: value for name in HUB if _given(value := rest.pop(name, None))}
    hub = {name: value for name, value in hub.items() if value != ""}
    made = Arguments(
        method=rest.pop("quantization_config", None),
        config=rest.pop("config", None),
        device_map=rest.pop("device_map", None),
        max_memory=rest.pop("max_memory", None),
        offload_folder=rest.pop("offload_folder", None),
        offload_buffers=bool(rest.pop("offload_buffers", False)),
        file=rest.pop("gguf_file", None),
        hub=hub,
        generation_config=rest.pop("generation_config", None),
        loading_info=bool(rest.pop("output_loading_info", False)),
        adapter_name=rest.pop("adapter_name", None) or "default",
    )
    made.implementations = {
        name: rest.pop(name)
        for name in ("attn_implementation", "experts_implementation")
        if name in rest
    }
    made.adapter_options = dict(rest.pop("adapter_kwargs", None) or {})
    made.adapter = made.adapter_options.pop("_adapter_model_path", None)
    torch_dtype = rest.pop("torch_dtype", None)
    dtype = rest.pop("dtype", None)
    made.dtype = read_dtype(dtype if dtype is not None else torch_dtype, problems)
    made.options = options_of(rest.pop("quantmill_options", None), problems)
    if getattr(made.method, "dequantize", None) is True:
        made.options.setdefault("dequantize", True)  # A peer's config object asks for it.
    made.rest = rest
    if problems:
        raise QuantmillError(*problems)
    return made
