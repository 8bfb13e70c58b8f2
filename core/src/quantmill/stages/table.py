"""Several methods in one checkpoint: the table of targets, written and read.

A checkpoint whose quantized modules all share one method and config has the peer's own
``quantization_config``. One method with options per module has it too, where the peer's dialect
can say so (:meth:`quantmill.config.MethodConfig.joined`). Anything else is written as ::

    {"quant_method": "quantmill", "table_version": 1,
     "methods": {"bnb-nf4": {...}, "bnb-int8": {...}},      label to the peer's config
     "targets": {"model.layers.0.mlp.up_proj": "bnb-int8", ...}}

The tensors of each module are in their method's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quantmill.findings import QuantmillError, declare
from quantmill.job import Job

__all__ = ["KEY", "is_table", "read_table", "stored_config"]

BAD_TABLE = declare("QM-TABLE-001", "The table of targets of a checkpoint is malformed")
KEY: Final = "quantmill"
_VERSION: Final = 1


def is_table(raw: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is a table of targets."""
    return raw.get("quant_method") == KEY


def read_table(raw: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Configs by label and labels by module.

    Raises:
        QuantmillError: it is malformed, or of a version this core does not know.
    """
    methods, targets = raw.get("methods"), raw.get("targets")
    problem = ""
    if raw.get("table_version") != _VERSION:
        problem = f"its table_version is {raw.get('table_version')!r}, this core reads {_VERSION}"
    elif not isinstance(methods, dict) or not all(isinstance(m, dict) for m in methods.values()):
        problem = "methods is not a mapping of configs"
    elif not isinstance(targets, dict) or not methods:
        problem = "targets is not a mapping, or methods is empty"
    else:
        lost = sorted({str(label) for label in targets.values()} - set(methods))
        if lost:
            problem = f"targets name methods that are not there: {', '.join(lost)}"
    if problem:
        raise QuantmillError(
            BAD_TABLE("quantization_config", problem, "update quantmill, or get it again")
        )
    assert isinstance(methods, dict) and isinstance(targets, dict)
    return methods, {str(name): str(label) for name, label in targets.items()}


def stored_config(job: Job) -> dict[str, Any]:
    """The ``quantization_config`` for what ``job.plan`` makes."""
    assert job.plan is not None and job.architecture is not None
    names = {item.name: job.architecture.module_prefix(item) for item in job.architecture.modules}
    labels: dict[str, str] = {}
    kept = []
    for entry in job.plan.modules:
        if entry.action == "quantize" and entry.target is not None and entry.method is not None:
            labels[names[entry.target.name]] = entry.method
        elif entry.action == "keep" and entry.origin in ("user", "default", "architecture"):
            # Peers look for the model's names, which a renaming may have changed since the file's.
            kept.append(entry.name)
    used = {label: job.selections[label] for label in dict.fromkeys(labels.values())}
    if not used:
        used = dict(list(job.selections.items())[:1])
    configs = {label: item.config.keeping(kept) for label, item in used.items()}
    main = next(iter(configs))
    if all(item == configs[main] for item in configs.values()):
        return configs[main].to_checkpoint()
    if len({item.method.name for item in used.values()}) == 1:
        others = {name: configs[label] for name, label in labels.items() if label != main}
        joined = configs[main].joined(others)
        if joined is not None:
            return joined
    return {
        "quant_method": KEY,
        "table_version": _VERSION,
        "methods": {label: item.to_checkpoint() for label, item in configs.items()},
        "targets": labels,
    }
