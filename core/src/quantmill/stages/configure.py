"""Stage 1, configuration: raw mappings to typed, frozen configs, and the merge policy.

Merge policy, declared by each config class: fields in ``runtime_fields`` say how to compute and
may be set by the user on top of a checkpoint; any other field that a user sets and that differs
from what the checkpoint says is a contradiction, refused with the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmill.config import MethodConfig
from quantmill.findings import FindingsError, QuantmillError, declare
from quantmill.hook_calls import PLUGIN_RAISED
from quantmill.job import Job, Selection
from quantmill.plugin_info import unusable_words
from quantmill.registrations import resolve

__all__ = ["configure", "merge", "read_config"]

UNKNOWN_DIALECT = declare("QM-CONFIG-010", "Nobody can read this quantization_config")
CONTRADICTION = declare("QM-CONFIG-011", "The user's config contradicts the checkpoint's")


def configure(
    job: Job, raw: Mapping[str, Any], origin: str, *, method: str | None = None
) -> tuple[str, MethodConfig]:
    """The method's name and its typed config.

    Raises:
        FindingsError: unknown dialect, unknown keys of a user, invalid or exclusive options.
    """
    with job.stage("configure"):
        if method is not None:
            raw = {**raw, "method": method}
        answer = job.host.hook.quantmill_configure(job=job, raw=raw, origin=origin)
        if answer is None:
            raise QuantmillError(_unknown(job, raw, origin))
        name, config = answer
        return str(name), config


def _unknown(job: Job, raw: Mapping[str, Any], origin: str) -> Any:
    where = "quantization_config" if origin == "checkpoint" else "method"
    for dialect in job.host.dialects:
        if dialect.refusal[0] and raw.get("quant_method") in dialect.quant_methods:
            why, instead = dialect.refusal
            asked = raw["quant_method"]
            return UNKNOWN_DIALECT(where, f"quant_method {asked!r} is not read: {why}", instead)
    readers = [dialect for dialect in job.host.dialects if not dialect.refusal[0]]
    known = sorted({key for dialect in readers for key in dialect.quant_methods})
    asked = raw.get("quant_method")
    if asked is None:
        cause = "it has no quant_method and no key that identifies a method"
        if not raw:
            cause = "nothing is set"
        fix = f"set quant_method to one of: {', '.join(known) or 'none installed'}"
    else:
        failed = job.host.unusable(str(asked))
        cause = f"no installed plugin reads quant_method {asked!r}{unusable_words(failed)}"
        fix = f"install the plugin for {asked}; installed ones read: {', '.join(known) or 'none'}"
        if failed:
            fix = failed[0].fix
    return UNKNOWN_DIALECT(where, cause, fix)


def read_config(job: Job, raw: Mapping[str, Any], origin: str) -> tuple[str, MethodConfig] | None:
    """The core's answer to ``quantmill_configure``: by method name, quant_method or marker key."""
    name = raw.get("method")
    methods = job.host.methods
    if not isinstance(name, str) or name not in methods:
        name = None
        for dialect in job.host.dialects:
            named = raw.get("quant_method") in dialect.quant_methods
            marked = "quant_method" not in raw and any(key in raw for key in dialect.marker_keys)
            if dialect.method not in methods:
                continue
            if (named or marked) and (dialect.accepts is None or resolve(dialect.accepts)(raw)):
                name = dialect.method
                if dialect.translate is not None:
                    raw = resolve(dialect.translate)(raw)
                break
    if name is None:
        return None
    config_class = _config_class(job, name)
    if origin == "checkpoint":
        config, findings = config_class.from_checkpoint(raw)
        job.findings.extend(findings)
        return name, config
    # What nobody wrote and the method does not know is no misspelling of a user's.
    known, implied = set(config_class.field_names()), job.request.implied
    raw = {key: value for key, value in raw.items() if key not in implied or key in known}
    return name, config_class.from_user(raw)


def merge(job: Job, stored: Selection, asked: Selection, raw: Mapping[str, Any]) -> Selection:
    """The checkpoint's selection with the user's runtime fields on top.

    Raises:
        FindingsError: one finding per contradiction, with both values.
    """
    if stored.method.name != asked.method.name:
        raise QuantmillError(
            CONTRADICTION(
                "method",
                f"the checkpoint is quantized with {stored.method.name},"
                f" and {asked.method.name} was asked for",
                "load it as it is, or dequantize it first",
            )
        )
    config_class = type(stored.config)
    given = config_class.normalise(raw)
    changes: dict[str, Any] = {}
    problems = []
    for field in given:
        if field not in config_class.model_fields:
            continue
        old, new = getattr(stored.config, field), getattr(asked.config, field)
        if old == new:
            continue
        if field in config_class.runtime_fields:
            changes[field] = new
        else:
            problems.append(
                CONTRADICTION(
                    field,
                    f"the checkpoint has {field}={old!r}, asked was {new!r}",
                    f"leave {field} out, or quantize the float model anew",
                )
            )
    if problems:
        raise FindingsError(problems)
    config = stored.config.model_copy(update=changes) if changes else stored.config
    return Selection(stored.label, stored.method, config, stored.plugin)


def _config_class(job: Job, name: str) -> type[MethodConfig]:
    """The config class of a method.

    Raises:
        QuantmillError: the plugin names something else, or what can't be imported.
    """
    reference = job.host.methods[name].config
    cause = f"{reference} is no MethodConfig"
    try:
        found = resolve(reference)
        if isinstance(found, type) and issubclass(found, MethodConfig):
            return found
    except Exception as error:  # noqa: BLE001 whatever importing a stranger's module raises
        cause = f"importing {reference} raised {type(error).__name__}: {error}"
    info = job.host.plugins[job.host.plugin_of("methods", name) or ""]
    fix = f"report it to {info.distribution} {info.version}, or disable it"
    raise QuantmillError(PLUGIN_RAISED(f"plugin {info.name}: config", cause, fix)) from None
