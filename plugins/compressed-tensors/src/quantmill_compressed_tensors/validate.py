"""Findings of the compressed-tensors backend before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantmill.findings import Finding, Severity, declare
from quantmill.job import Job
from quantmill_compressed_tensors.config import FORMATS, CompressedConfig
from quantmill_compressed_tensors.inputs import is_applied
from quantmill_compressed_tensors.schemes import Scheme

__all__ = ["check"]

UNREAD_FORMAT = declare("QM-CT-010", "A format of compressed-tensors that is not supported")
TWO_GROUPS = declare("QM-CT-011", "Two config groups claim the same modules")
NOT_APPLIED = declare(
    "QM-CT-012", "A part of the config is kept and not applied", Severity.WARNING, fallback=True
)
BAD_WEIGHTS = declare("QM-CT-013", "A config group asks for weights that no format holds")


def check(job: Job) -> Iterator[Finding]:
    """Everything in the configs that will not be computed as it says."""
    for label, selection in job.selections.items():
        if isinstance(selection.config, CompressedConfig):
            yield from _config(selection.config)
            yield from _twice(job, label, selection.config)
            if not job.prequantized:
                yield from _made(selection.config)


def _config(config: CompressedConfig) -> Iterator[Finding]:
    if config.format not in (None, "dense", "mixed-precision", *FORMATS):
        yield _unread("format", str(config.format))
    if (config.sparsity_config or {}).get("format") not in (None, "dense"):
        yield _unread("sparsity_config", str((config.sparsity_config or {})["format"]))
    if (config.transform_config or {}).get("config_groups"):
        yield _unread("transform_config", "rotations of weights and activations")
    if config.kv_cache_scheme is not None:
        yield _kept("kv_cache_scheme", "the KV cache stays float")
    for name, group in config.config_groups.items():
        yield from _group(f"config_groups.{name}", group)


def _group(where: str, group: Scheme) -> Iterator[Finding]:
    if group.format not in (None, "dense", *FORMATS):
        yield _unread(f"{where}.format", str(group.format))
    if group.output_activations is not None:
        yield _kept(f"{where}.output_activations", "outputs stay float")
    for part in ("weights", "input_activations"):
        args: Any = getattr(group, part)
        if args is None:
            continue
        most = 8 if part == "weights" else 16
        right = 2 <= args.num_bits <= most
        if args.type == "float":
            right = args.num_bits == 8 or (args.num_bits == 4 and args.group_size in (16, 32))
        if not right:
            yield BAD_WEIGHTS(
                f"{where}.{part}",
                f"{args.type} of {args.num_bits} bits is none of int 2 to {most}, float 8, and"
                " float 4 in groups of 16 or 32",
                "take another num_bits or type",
            )
    inputs = group.input_activations
    if inputs is not None and not is_applied(inputs):
        yield NOT_APPLIED(
            f"{where}.input_activations",
            f"{where}.input_activations is kept, and activations of {inputs.words} are computed"
            " with as they come",
            "nothing to do: results are closer to the float model's",
        )
    weights = group.weights
    if weights is None or weights.type == "float":
        return
    if weights.means in ("tensor_group", "token", "attn_head"):
        yield BAD_WEIGHTS(
            f"{where}.weights",
            f"strategy {weights.means} is not for integer weights",
            "take channel or group",
        )


def _made(config: CompressedConfig) -> Iterator[Finding]:
    """What can be read but not made."""
    for name, group in config.config_groups.items():
        inputs, weights = group.input_activations, group.weights
        if inputs is not None and inputs.dynamic is not True:
            yield BAD_WEIGHTS(
                f"config_groups.{name}.input_activations",
                "stored scales of activations need calibration, which this method does not do",
                "set dynamic to true",
            )
        if weights is not None and weights.type == "int" and weights.means == "block":
            yield BAD_WEIGHTS(
                f"config_groups.{name}.weights",
                "integers by blocks are read, not made",
                "take channel or group, or the type float",
            )
        packed = group.stores_as in ("pack-quantized", "int-quantized")
        if weights is None or (weights.type == "float" and packed):
            yield BAD_WEIGHTS(
                f"config_groups.{name}",
                f"{group.stores_as} holds integers, and the group has none",
                "give the group integer weights, or the format float-quantized",
            )


def _twice(job: Job, label: str, config: CompressedConfig) -> Iterator[Finding]:
    """Groups of which none outranks the other: which of them a module is in, readers decide
    differently (the library by text, vLLM by the order in the file)."""
    modules: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in job.plan.modules if job.plan is not None else ():
        # What a group makes of the config for its modules has the config's label before its own.
        ours = entry.method == label or str(entry.method).startswith(f"{label} (")
        if not ours or entry.action != "quantize" or entry.target is None:
            continue
        claims = config.claims(entry.target.name, entry.target.module.cls)
        for other in claims[1:]:
            if other.rank == claims[0].rank and other.group != claims[0].group:
                key = (claims[0].group, claims[0].target, other.group, other.target)
                modules.setdefault(key, []).append(entry.name)
    for (one, text, two, other_text), names in modules.items():
        more = f" (and {len(names) - 1} more)" if names[1:] else ""
        yield TWO_GROUPS(
            names[0],
            f"config group {one} claims it{more} by {text!r}, and group {two} by {other_text!r}",
            "let one group name it: by a narrower expression, or by its full name",
        )


def _unread(where: str, what: str) -> Finding:
    return UNREAD_FORMAT(
        where,
        f"{what} is not supported; read and written are {', '.join(FORMATS)}",
        "decompress it with the compressed-tensors library first",
    )


def _kept(where: str, what: str) -> Finding:
    return NOT_APPLIED(where, f"{where} is kept in the config, but {what}", "nothing to do")
