"""Which ``from_pretrained`` calls are ours: decided by the ``quant_method`` they are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from quantmill.config import MethodConfig, suggestion
from quantmill.findings import QuantmillError, declare
from quantmill.host import Host
from quantmill.job import Request
from quantmill.registrations import resolve
from quantmill.stages.select import OWN_KEYS
from quantmill.stages.table import KEY

__all__ = ["claims", "installed_keys", "quant_method_of", "resolve_names", "stored_config_of"]

UNKNOWN_NAME = declare("QM-TF-010", "activate() was given a name that no installed plugin reads")

_SUFFIXES = ("_4bit", "_8bit")


def installed_keys(host: Host) -> set[str]:
    """Values of ``quant_method`` that installed plugins read, tables of targets included."""
    return {KEY, *(key for item in host.dialects for key in item.quant_methods)}


def theirs() -> set[str]:
    """Values of ``quant_method`` that the installed transformers reads itself."""
    found: set[str] = set()
    for key in AUTO_QUANTIZER_MAPPING:
        name = str(getattr(key, "value", key))
        # bitsandbytes has an entry for each of its two methods, under names of its own.
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        found.add(name)
    return found


def resolve_names(names: Iterable[str], host: Host) -> set[str]:
    """``quant_method`` keys for what a user listed: keys, methods, their short names, or ``*``.

    Raises:
        QuantmillError: a name means nothing here.
    """
    keys, found, problems = installed_keys(host), set(), []
    methods = {name: item.quant_methods for name, item in host.methods.items()}
    methods |= {alias: m.quant_methods for m in host.methods.values() for alias in m.aliases}
    methods |= {name: item.quant_methods for name, (item, _) in host.presets.items()}
    for name in names:
        if name == "*":
            found |= keys
        elif name in keys:
            found.add(name)
        elif name in methods:
            found |= set(methods[name])
        else:
            known = sorted({*keys, *methods})
            problems.append(
                UNKNOWN_NAME(
                    name,
                    f"no installed plugin reads quant_method {name!r}",
                    suggestion(name, known) or f"use some of: {', '.join(known)}; or '*' for all",
                )
            )
    if problems:
        raise QuantmillError(*problems)
    return found


def quant_method_of(value: Any, host: Host) -> str | None:
    """The ``quant_method`` that a config is about; None where it names none.

    Methods of ours have a config without one too: see :func:`claims`.
    """
    data = value if isinstance(value, Mapping) else None
    if data is None:
        to_dict = getattr(value, "to_dict", None)
        data = dict(to_dict()) if callable(to_dict) else {}
    named = data.get("quant_method", getattr(value, "quant_method", None))
    if named is not None:
        return str(getattr(named, "value", named))
    for dialect in host.dialects:
        if any(key in data for key in dialect.marker_keys) and (
            dialect.accepts is None or resolve(dialect.accepts)(data)
        ):
            return dialect.quant_methods[0]
    return None


def claims(value: Any, taken: set[str], host: Host) -> bool:
    """Whether a config, the user's or a checkpoint's, is for us.

    It is where transformers has no way to read it, or where its ``quant_method`` was taken over.
    """
    if value is None:
        return False
    if isinstance(value, str | MethodConfig | Request):
        return True
    if isinstance(value, Mapping) and any(key in value for key in OWN_KEYS):
        return True
    key = quant_method_of(value, host)
    return key is None or key in taken or key not in theirs()


def stored_config_of(config: Any) -> Any:
    """The ``quantization_config`` of a checkpoint from its config, which may be a nested one's."""
    data = config if isinstance(config, Mapping) else None
    if data is None:
        stored = getattr(config, "quantization_config", None)
        if stored is None:
            text = config.get_text_config(decoder=True)
            stored = getattr(text, "quantization_config", None)
        return stored
    text = data.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    return data.get("quantization_config") or nested
