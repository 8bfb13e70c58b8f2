"""Stage 2, selection: from METHOD as a user writes it to registered methods with configs.

One grammar everywhere. METHOD is one of

- a short name: ``bnb-nf4``, with options after a colon: ``bnb-nf4:bnb_4bit_blocksize=128``;
- JSON text of a config: ``{"quant_method": "bitsandbytes", "load_in_4bit": true}``;
- a path to a JSON or YAML file with such a config;
- in Python also a dict, or a config object.

A dict may hold, besides the config, ``method`` (a short name), ``skip`` and ``include`` (lists of
patterns) and ``assign`` (pattern to METHOD, for several methods in one model).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.config import MethodConfig, suggestion
from quantmill.findings import QuantmillError, declare
from quantmill.host import Host
from quantmill.job import Job, Request, Selection
from quantmill.plugin_info import unusable_words
from quantmill.registrations import Method, resolve
from quantmill.requirements import missing_requirements
from quantmill.stages.configure import configure, merge
from quantmill.stages.table import is_table, read_table

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders

__all__ = [
    "OWN_KEYS",
    "add_selection",
    "detect",
    "make_selection",
    "parse_method",
    "select",
]

UNKNOWN_METHOD = declare("QM-SELECT-001", "No installed plugin has this method")
UNREADABLE_METHOD = declare("QM-SELECT-002", "METHOD can't be read")
NOTHING_ASKED = declare("QM-SELECT-003", "No method was given and the checkpoint is not quantized")
CONFLICTING_SELECTION = declare("QM-SELECT-004", "Two plugins select different methods")
ALREADY_SEVERAL = declare(
    "QM-SELECT-006", "A method was asked for, and the checkpoint holds several already"
)
UNREADABLE_STORED = declare("QM-SELECT-007", "A checkpoint's quantization_config can't be read")
MISSING_LIBRARY = declare("QM-SELECT-005", "A method's library is missing or of a wrong version")

OWN_KEYS = ("method", "skip", "include", "assign")


def parse_method(value: Any, host: Host) -> Request:
    """Parse METHOD.

    Raises:
        QuantmillError: it is no short name, JSON or file, or names an unknown method.
    """
    if value is None:
        return Request()
    if isinstance(value, Request):
        return value
    if isinstance(value, MethodConfig):
        raw = value.changed()
        for method in host.methods.values():
            if method.config == f"{type(value).__module__}:{type(value).__qualname__}":
                return Request(raw, method.name, method.name)
    if isinstance(value, Mapping):
        return _from_mapping(dict(value), "the given config", host)
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):  # a peer's config object
        data = dict(to_dict())
        request = _from_mapping(data, type(value).__name__, host)
        return replace(request, implied=_defaults(type(value), data))
    package = type(value).__module__.partition(".")[0]
    for dialect in host.dialects:
        if package in dialect.objects and dialect.from_object is not None:
            found = resolve(dialect.from_object)(value)
            if found is not None:
                return _from_mapping(dict(found), type(value).__name__, host)
    text = str(value).strip()
    if text.startswith("{"):
        return _from_text(text, "the given JSON", host)
    if text.endswith((".json", ".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise QuantmillError(
                UNREADABLE_METHOD(text, f"there is no file {text}", "give an existing file")
            )
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise QuantmillError(
                UNREADABLE_METHOD(text, f"it can't be read: {error}", "give a file of UTF-8 text")
            ) from None
        return _from_text(content, path.name, host)
    return _from_short_name(text, host)


def _defaults(cls: type, data: Mapping[str, Any]) -> frozenset[str]:
    """Keys whose value is the default that a constructor declares, the class's or a base's."""
    known: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):
        if base is not object and "__init__" in vars(base):
            known |= inspect.signature(vars(base)["__init__"]).parameters
    return frozenset(key for key in data if key in known and data[key] == known[key].default)


def _from_text(text: str, where: str, host: Host) -> Request:
    import yaml

    try:
        data = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise QuantmillError(
            UNREADABLE_METHOD(where, f"not valid JSON or YAML: {error}", "correct the syntax")
        ) from None
    if not isinstance(data, Mapping):
        raise QuantmillError(
            UNREADABLE_METHOD(where, "it does not hold a mapping", "write key: value pairs")
        )
    return _from_mapping(dict(data), where, host)


def _from_short_name(text: str, host: Host) -> Request:
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    # A comma within brackets belongs to a value: name:patterns=["a","b"].
    for item in filter(None, re.split(r",(?![^\[{]*[\]}])", rest)):
        key, separator, value = item.partition("=")
        if not separator:
            raise QuantmillError(
                UNREADABLE_METHOD(
                    text, f"option {item!r} has no value", f"write {name}:{item}=VALUE"
                )
            )
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value.strip()
    if name in host.presets:
        method, preset = host.presets[name]
        return Request({**preset.options, **options}, method.name, text, text)
    for method in host.methods.values():
        if name == method.name or name in method.aliases:
            return Request(options, method.name, text, text)
    raise QuantmillError(unknown_method(name, host))


def unknown_method(name: str, host: Host) -> Any:
    """The finding for a name nobody registered, with what could be meant or installed."""
    for method in host.methods.values():
        if name in method.refused:
            return UNKNOWN_METHOD(name, *method.refused[name])
    known = [*host.presets, *host.methods]
    hint = suggestion(name, known)
    failed = host.unusable(name)
    fix = hint or f"use one of: {', '.join(sorted(known)) or 'none installed'}"
    fix += ", or install the plugin that has it"
    if failed and name.startswith(failed[0].name):
        fix = failed[0].fix
    cause = f"no installed plugin has a method {name!r}{unusable_words(failed)}"
    return UNKNOWN_METHOD(name, cause, fix)


def _from_mapping(data: dict[str, Any], where: str, host: Host) -> Request:
    name = data.get("method")
    skip = _patterns(data.get("skip"), where)
    include = _patterns(data.get("include"), where)
    given = data.get("assign") or {}
    if not isinstance(given, Mapping):
        raise QuantmillError(
            UNREADABLE_METHOD(where, "assign is no mapping", "write pattern: METHOD pairs")
        )
    assign = {str(pattern): parse_method(value, host) for pattern, value in given.items()}
    raw = {key: value for key, value in data.items() if key not in OWN_KEYS}
    method = None
    if name is not None:
        base = _from_short_name(str(name), host)
        raw, method = {**(base.raw or {}), **raw}, base.method
    label = "" if name is None else str(name)
    return Request(raw, method, where, label, skip, include, assign)


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise QuantmillError(
        UNREADABLE_METHOD(where, "skip and include are lists of patterns", "write a list")
    )


def detect(headers: CheckpointHeaders, host: Host) -> None:
    """Put the config that a dialect recognises where a ``quantization_config`` would be, for
    checkpoints whose writers keep none there.

    Raises:
        QuantmillError: a dialect recognises the checkpoint, and it can't be read.
    """
    if headers.config.get("quantization_config"):
        return
    for dialect in host.dialects:
        if dialect.detect is None or not any(_has(headers, sign) for sign in dialect.signs):
            continue
        found = resolve(dialect.detect)(headers)
        if found is not None:
            headers.config["quantization_config"] = dict(found)
            return


def _has(headers: CheckpointHeaders, sign: str) -> bool:
    return any(name.endswith(sign) for name in headers.tensors) or headers.source.exists(sign)


def select(job: Job) -> dict[str, Selection]:
    """Fill ``job.checkpoint_config`` and ``job.selections`` from the request and the checkpoint.

    Raises:
        QuantmillError: unknown method, contradiction, invalid config; every cause at once.
    """
    with job.stage("select"):
        stored = job.headers.config.get("quantization_config")
        if stored and not isinstance(stored, Mapping):
            raise QuantmillError(
                UNREADABLE_STORED(
                    "quantization_config",
                    f"it is a {type(stored).__name__}, not an object",
                    "correct config.json",
                )
            )
        if stored and is_table(stored):
            return _several(job, stored)
        if stored:
            name, config = configure(job, stored, "checkpoint")
            job.checkpoint_config = make_selection(job, name, config, "checkpoint")
        request = job.request
        if request.raw is None:
            if job.checkpoint_config is None:
                raise QuantmillError(
                    NOTHING_ASKED(
                        job.request.text or "method",
                        "the checkpoint holds float weights and no method was asked for",
                        f"name one: {', '.join(sorted(job.host.presets)) or 'install a plugin'}",
                    )
                )
            main = job.checkpoint_config
        else:
            name, config = configure(job, request.raw, "user", method=request.method)
            main = make_selection(job, name, config, request.label or name)
            if job.checkpoint_config is not None:
                written = {k: v for k, v in request.raw.items() if k not in request.implied}
                main = merge(job, job.checkpoint_config, main, written)
        job.selections = {main.label: main}
        job.assigned = {}
        for pattern, part in request.assign.items():
            part_name, part_config = configure(job, part.raw or {}, "user", method=part.method)
            made = make_selection(job, part_name, part_config, part.label or part_name)
            job.assigned[pattern] = add_selection(job, made)
        return job.selections


def add_selection(job: Job, selection: Selection) -> str:
    """Add a selection under a label of its own; the same method and config share one."""
    for label, other in job.selections.items():
        if other.method.name == selection.method.name and other.config == selection.config:
            return label
    label, count = selection.label, 1
    while label in job.selections:
        count += 1
        label = f"{selection.label} #{count}"
    job.selections[label] = replace(selection, label=label)
    return label


def _several(job: Job, raw: Mapping[str, Any]) -> dict[str, Selection]:
    """Selections of a checkpoint that holds several methods."""
    if job.request.raw is not None:
        raise QuantmillError(
            ALREADY_SEVERAL(
                job.request.text or "method",
                "the checkpoint holds several methods already, and another was asked for",
                "load it as it is, or give the float checkpoint as the source",
            )
        )
    methods, job.stored_targets = read_table(raw)
    for label, config in methods.items():
        name, typed = configure(job, config, "checkpoint")
        job.selections[label] = make_selection(job, name, typed, label)
    job.checkpoint_config = next(iter(job.selections.values()))
    return job.selections


def make_selection(job: Job, name: str, config: MethodConfig, label: str) -> Selection:
    """The registered method that carries out ``name`` with ``config``, as the plugins select it.

    Raises:
        QuantmillError: two plugins select differently, or a library is missing.
    """
    answers = job.host.hook.quantmill_select(job=job, name=name)
    distinct = {answer.method.name: answer for answer in answers}
    if len(distinct) > 1:
        raise QuantmillError(
            CONFLICTING_SELECTION(
                name,
                f"plugins {', '.join(answer.plugin for answer in distinct.values())}"
                f" select {', '.join(distinct)}",
                "disable one of them",
            )
        )
    if distinct:
        chosen: Selection = next(iter(distinct.values()))
        return chosen
    method = job.host.methods[name]
    _require(method)
    plugin = job.host.plugin_of("methods", name) or ""
    return Selection(label if label != "checkpoint" else name, method, config, plugin)


def _require(method: Method) -> None:
    problems = [
        MISSING_LIBRARY(
            method.name,
            f"needs {item.distribution}{item.versions}, {there}. {item.why}".strip(),
            f'pip install "{item.distribution}{item.versions}"',
        )
        for item, there in missing_requirements(method.requirements)
        if not item.optional
    ]
    if problems:
        raise QuantmillError(*problems)
