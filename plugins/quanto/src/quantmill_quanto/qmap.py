"""Optimum-quanto's map of modules, ``quanto_qmap.json``: read, checked and made.

The package's own checkpoints have it in place of a ``quantization_config``. It must be true: it
may name neither absent modules nor other types than the tensors have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from quantmill.findings import Finding, QuantmillError, declare
from quantmill_quanto.config import FLOATS, QMAP, QuantoConfig, Weights, plain, qtype

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
    from quantmill.job import Job

__all__ = ["check", "detect", "note_targets"]

BAD_MAP = declare("QM-QUANTO-003", "A quanto map can't be read")
ABSENT = declare("QM-QUANTO-004", "A quanto map names modules that the checkpoint does not hold")
OTHER_TYPE = declare("QM-QUANTO-005", "A quanto map gives a weight another type than its tensors")
ACTIVATIONS = declare("QM-QUANTO-010", "Quantized activations and calibration go together")
_MOST = 64 << 20
_SHOWN = 5
_DTYPES = {
    "I8": "int8",
    "F8_E4M3": "float8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
}
_FIX = "the checkpoint is damaged: get it again, or correct the map"


def _read(headers: CheckpointHeaders) -> dict[str, dict[str, Any]] | None:
    """The map, or None where there is none.

    Raises:
        QuantmillError: it is no object of objects.
    """
    source = headers.source
    if not source.exists(QMAP):
        return None
    size = source.size(QMAP)
    problem = f"it has {size:,} bytes" if size > _MOST else ""
    found: Any = None
    if not problem:
        try:
            found = json.loads(source.read(QMAP, 0, size))
        except (ValueError, RecursionError) as error:
            problem = f"it is not valid JSON: {str(error)[:160]}"
        else:
            if not isinstance(found, dict) or not found:
                problem = "it is no object of modules, or names none"
    if problem:
        raise QuantmillError(BAD_MAP(QMAP, problem, _FIX))
    strange = [
        BAD_MAP(name, f"{QMAP} gives it {json.dumps(item)[:80]}: {problem}", _FIX)
        for name, item in found.items()
        if (problem := _strange(item))
    ]
    if strange:
        raise QuantmillError(*strange[:_SHOWN])
    table: dict[str, dict[str, Any]] = found
    return table


def _strange(item: Any) -> str:
    """Why an entry of the map can't be; empty where it can."""
    if not isinstance(item, dict):
        return "an object with weights and activations is wanted"
    for field, known in (("weights", get_args(Weights)), ("activations", (None, "int8", *FLOATS))):
        value = item.get(field)
        if not isinstance(value, str | None) or plain(value) not in known:
            names = ", ".join(str(qtype(name)) for name in known)
            return f"its {field} are none of {names}"
    return ""


def detect(headers: CheckpointHeaders) -> dict[str, Any] | None:
    """The ``quantization_config`` that the map stands for, or None where there is no map."""
    table = _read(headers)
    if table is None:
        return None
    activations = {str(plain(v)) for item in table.values() if (v := item.get("activations"))}
    weights = list(dict.fromkeys(str(plain(item.get("weights"))) for item in table.values()))
    return {
        "quant_method": "quanto",
        "weights": weights[0],
        "mixed": weights[1:] or None,
        "activations": next(iter(activations - {"None"}), None),
        "modules_to_not_convert": None,
    }


def check(job: Job) -> Iterator[Finding]:
    """What a config or a map asks for and can't have."""
    for selection in job.selections.values():
        config = selection.config
        if not isinstance(config, QuantoConfig) or job.prequantized:
            continue
        calibrates = selection.method.capabilities.calibrated
        if (config.activations is not None) != calibrates:
            yield ACTIVATIONS(
                "activations",
                f"activations={config.activations!r} and the method is {selection.method.name}:"
                " scales of activations come from calibration, and only they need it",
                "take quanto-activations with activations=int8 and calibration data"
                if not calibrates
                else "set activations to int8 or float8, or take quanto",
            )
    if not job.prequantized:
        return
    try:
        table = _read(job.headers) or {}
    except QuantmillError as error:
        yield from error.findings
        return
    there = {
        name.partition(".weight._data")[0] for name in job.headers.tensors if ".weight._" in name
    }
    lost = sorted(set(table) - there)
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        yield ABSENT(
            lost[0],
            f"{QMAP} names {', '.join(lost[:_SHOWN])}{more}, and no tensor is quantized there",
            _FIX,
        )
    for name, item in table.items():
        found = _stored(job.headers.tensors, name)
        if found and found != (said := plain(item["weights"])):
            yield OTHER_TYPE(
                name, f"{QMAP} says {qtype(said)}, and its tensors are {qtype(found)}", _FIX
            )


def _stored(tensors: Mapping[str, TensorHeader], name: str) -> str | None:
    """The type of a module's weight by its tensors; None where they tell none."""
    data = tensors.get(f"{name}.weight._data")
    if data is not None:
        return _DTYPES.get(data.dtype)
    packed = tensors.get(f"{name}.weight._data._data")
    scale = tensors.get(f"{name}.weight._scale")
    if packed is None or scale is None or not packed.shape or not scale.shape:
        return None
    rows = scale.shape[0]
    bits = [item for item in (4, 2) if packed.shape[0] == -(-rows * item // 8)]
    return f"int{bits[0]}" if len(bits) == 1 else None


def note_targets(job: Job) -> None:
    """Tell every Quanto config which modules the plan quantizes, for the map that it writes."""
    if job.plan is None or job.architecture is None or job.prequantized:
        return
    names: dict[str, list[str]] = {}
    for entry in job.plan.modules:
        if entry.action == "quantize" and entry.target is not None and entry.method is not None:
            prefix = job.architecture.module_prefix(entry.target.module)
            names.setdefault(entry.method, []).append(prefix)
    for label, selection in job.selections.items():
        if isinstance(selection.config, QuantoConfig):
            noted = selection.config.model_copy(update={"quantized": tuple(names.get(label, ()))})
            job.selections[label] = dataclasses.replace(selection, config=noted)
