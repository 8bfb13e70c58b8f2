"""The typed config that a ``from_pretrained`` call is about, from a folder or a single file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from quantmill_transformers.arguments import Arguments

__all__ = ["config_of_file", "config_of_folder", "locate_file"]

Found = tuple[Any, dict[str, Any]]
"""The config, and what the rest of the arguments gives the model's class."""


def locate_file(source: Any, name: str | None, hub: Mapping[str, Any]) -> str:
    """The path of a file: ``source`` itself, or the file ``name`` of a folder or on the Hub, which
    is then downloaded. ``hub`` holds those of :data:`quantmill.pretrained.HUB` that were given."""
    if name is None or Path(name).is_file():
        return str(source if name is None else name)
    if Path(source).is_dir():
        return str(Path(source) / hub.get("subfolder", "") / name)
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(str(source), name, **hub))


def config_of_folder(cls: type[PreTrainedModel], where: str, asked: Arguments) -> Found:
    """The config in a folder or on the Hub, unless the call has one."""
    if isinstance(asked.config, PreTrainedConfig):
        return _settled(copy.deepcopy(asked.config), asked), asked.rest
    name, _, revision = (where, "", "") if Path(where).is_dir() else where.partition("@")
    config_class: Any = cls.config_class
    config, rest = config_class.from_pretrained(
        name if asked.config is None else asked.config,
        return_unused_kwargs=True,
        **({"revision": revision} if revision else {}),
        **asked.rest,
    )
    return _settled(config, asked), rest


def config_of_file(where: str, data: Mapping[str, Any], asked: Arguments) -> Found:
    """The config that a file's reader found, which knows what its tensors stand for.

    Auto classes have read the file in their own way by then and give what they found as the call's
    config: of that, what differs from the file is what the user wants.
    """
    plain = {key: copy.deepcopy(v) for key, v in data.items() if key != "quantization_config"}
    config, rest = CONFIG_MAPPING[plain["model_type"]].from_dict(
        plain, return_unused_kwargs=True, **asked.rest
    )
    if isinstance(asked.config, PreTrainedConfig):
        theirs = AutoConfig.from_pretrained(Path(where).parent, gguf_file=Path(where).name)
        for key, value in asked.config.to_dict().items():
            if key in config.to_dict() and theirs.to_dict().get(key) != value:
                setattr(config, key, value)
        for key in ("_attn_implementation", "_experts_implementation"):
            if getattr(asked.config, key, None) is not None:
                setattr(config, key, getattr(asked.config, key))
    return _settled(config, asked), rest


def _settled(config: Any, asked: Arguments) -> Any:
    for name, value in asked.implementations.items():
        setattr(config, f"_{name}", value)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config
