"""What a plugin registers: frozen data and import strings, nothing that has to be imported.

A registration names heavy things (config classes, quantizers, codecs, kernels) by *import string*,
``"package.module:attribute"``. :func:`resolve` imports one on first use. Therefore an entry module
costs neither torch nor a vendor library, and ``quantmill plugins`` answers in milliseconds.

The fields here are part of the hook contract: see ``HOOK_API_VERSION`` in
:mod:`quantmill.hookspecs`. New fields come with defaults, so older plugins keep working.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantmill.importing import without_collector

__all__ = [
    "Capabilities",
    "CodecRegistration",
    "ConfigReader",
    "Container",
    "Finalizer",
    "ImportString",
    "Kernel",
    "Method",
    "ModelSource",
    "Preset",
    "Requirement",
    "TargetingRule",
    "Validator",
    "resolve",
]

ImportString = str
_IMPORT_STRING = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def resolve(reference: ImportString) -> Any:
    """Import what ``"package.module:attribute"`` names.

    Raises:
        ValueError: the string is not of that form.
        ImportError: the module, or the attribute in it, does not exist.
    """
    if not _IMPORT_STRING.fullmatch(reference):
        raise ValueError(f"{reference!r} is not of the form 'package.module:attribute'")
    module_name, _, path = reference.partition(":")
    with without_collector():
        value: Any = importlib.import_module(module_name)
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError as error:
            raise ImportError(f"{reference!r}: no attribute {name!r}") from error
    return value


@dataclass(frozen=True, slots=True)
class Requirement:
    """Something a plugin, a method or a kernel needs from its environment.

    It is checked from metadata alone (no import), before anything that needs it is imported.
    """

    distribution: str
    """Name of the distribution, as ``pip`` knows it."""
    versions: str = ""
    """PEP 440 range, for example ``">=0.46,<1"``; empty for any."""
    why: str = ""
    """What it is needed for, shown to the user."""
    optional: bool = False
    """A missing optional requirement is a finding, not a reason to refuse."""
    compute_capability: tuple[int, int] | None = None
    """Least CUDA compute capability, checked only for jobs on a CUDA device."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method can do. Declared here, tested by the conformance suite."""

    on_the_fly: bool = False
    """Quantizes from float weights alone while loading."""
    calibrated: bool = False
    """Needs calibration data to quantize."""
    prequantized: bool = False
    """Loads checkpoints that are already quantized."""
    serialisable: bool = False
    """Writes checkpoints that its peer reads."""
    trainable: bool = False
    """Gradients flow through its linears to their inputs (adapters can be trained)."""
    compileable: bool = False
    """Its linears run under ``torch.compile`` without graph breaks."""
    dequantizable: bool = False
    """Turns back into float modules."""
    devices: tuple[str, ...] = ("cpu",)
    """Torch device types on which its linears compute."""
    target_kinds: tuple[str, ...] = ("linear",)
    """Kinds of targets it takes: ``linear``, ``conv1d``, ``embedding``, ``stacked``."""
    bits: tuple[float, ...] = ()
    """Nominal bits per code that it offers."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A short name for a method with options, usable wherever a METHOD is asked for."""

    name: str
    options: Mapping[str, Any]
    """Fields of the method's config."""
    summary: str = ""
    bits: float = 0.0
    """Nominal bits per code: orders presets by how much they lose."""


@dataclass(frozen=True, slots=True)
class Method:
    """A quantization method: everything the stages need to know about it, as data."""

    name: str
    summary: str
    config: ImportString
    """A subclass of :class:`quantmill.config.MethodConfig`."""
    quantizer: ImportString
    """A subclass of :class:`quantmill.backend.Quantizer`."""
    codec: ImportString
    """A subclass of :class:`quantmill.backend.Codec`: form to and from its disk layout."""
    capabilities: Capabilities
    quant_methods: tuple[str, ...] = ()
    """Values of ``quantization_config.quant_method`` in checkpoints that this method reads. The
    first one is what it writes."""
    linear: ImportString | None = None
    """A subclass of :class:`quantmill.backend.LinearFactory`; without one the core's own linear
    holds the form."""
    calibrator: ImportString | None = None
    """A subclass of :class:`quantmill.backend.BlockCalibrator`, for calibrated methods."""
    presets: tuple[Preset, ...] = ()
    aliases: tuple[str, ...] = ()
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Short names that users know from elsewhere and that can't be made: why, and what to do
    instead."""
    requirements: tuple[Requirement, ...] = ()
    schema_version: int = 1


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Reads a peer's configuration dialect and says which method it means."""

    name: str
    quant_methods: tuple[str, ...]
    """Values of ``quant_method`` that this dialect uses."""
    method: str
    """Name of the registered method that the config belongs to."""
    marker_keys: tuple[str, ...] = ()
    """Keys that identify the dialect in a dict without ``quant_method``."""
    rules: ImportString | None = None
    """``rules(config, origin) -> list[Rule]``: the dialect's skip lists and per-module options as
    targeting rules; :mod:`quantmill.targeting.dialects` has the usual translations."""
    accepts: ImportString | None = None
    """``accepts(raw) -> bool``, for a ``quant_method`` that several dialects share."""
    refusal: tuple[str, str] = ("", "")
    """Why such a config is not read, and what to do instead: of a dialect that is known and has no
    method. A plugin that does read it comes first."""
    translate: ImportString | None = None
    """``translate(raw) -> Mapping``: the config in the words of the method's own dialect, for a
    dialect with other fields."""
    detect: ImportString | None = None
    """``detect(headers) -> Mapping | None``: the config that a checkpoint without a
    ``quantization_config`` stands for, from its tensors or the files beside them."""
    signs: tuple[str, ...] = ()
    """Ends of tensors' names, or names of files, one of which a checkpoint that ``detect`` may
    recognise has: others are not asked about."""
    objects: tuple[str, ...] = ()
    """Top-level packages whose config objects users may give as METHOD."""
    from_object: ImportString | None = None
    """``from_object(value) -> Mapping | None``: the config that such an object stands for; not
    needed for objects with ``to_dict``."""


@dataclass(frozen=True, slots=True)
class CodecRegistration:
    """A disk layout of some form, usable by conversion without its method."""

    name: str
    form: str
    codec: ImportString
    quant_method: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation of one operation on one kind of form."""

    name: str
    operation: str
    """``quantize``, ``dequantize``, ``matmul``, ...; signatures in :mod:`quantmill.kernels`."""
    form: str
    """Kind of form: ``affine``, ``codebook``, ``scaled_float`` or a plugin's own."""
    implementation: ImportString
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Activation or weight dtypes it takes."""
    constraints: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Facts of the form's ``traits()`` that it needs: name to allowed values."""
    cost: float = 1.0
    """Rough time relative to the plain torch reference; the smallest is chosen."""
    requirements: tuple[Requirement, ...] = ()
    available: ImportString | None = None
    """``available() -> str | None``: None, or why it can't run on this machine."""
    max_rows: int | None = None
    """Most activation rows for which it is meant (batch), None for any."""
    layout: str = ""
    """Name of the live layout it reads; empty when it reads the form as it is. Kernels of one
    layout work on the same prepared tensors."""
    prepare: ImportString | None = None
    """``prepare(form) -> dict[str, Tensor]``: the form in the layout. Works on the meta device
    too, so that a plan knows the bytes."""
    restore: ImportString | None = None
    """``restore(tensors, skeleton) -> Form``: the exact inverse; ``skeleton`` is the form on the
    meta device."""
    bind: ImportString | None = None
    """``bind(weight) -> fn(x, bias)``: a matmul of one weight (what ``implementation`` takes before
    the bias), for a kernel that can work out once what each call would repeat."""


@dataclass(frozen=True, slots=True)
class TargetingRule:
    """A rule a plugin adds to every job: include or skip what the pattern matches."""

    pattern: str
    action: str
    reason: str
    methods: tuple[str, ...] = ()
    """Only for these methods; empty for all."""


@dataclass(frozen=True, slots=True)
class Validator:
    """``check(job) -> Iterable[Finding]`` by import string; run in the validation stage."""

    name: str
    check: ImportString
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finalizer:
    """``finalize(job, model) -> Iterable[Finding] | None``, run after all targets are in place."""

    name: str
    finalize: ImportString
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Supplies architectures: from a checkpoint folder to a module tree on the meta device."""

    name: str
    summary: str
    open: ImportString
    """``open(headers) -> Architecture | None``; None when the folder is not of its kind."""
    requirements: tuple[Requirement, ...] = ()
    priority: int = 0
    """Asked in descending order; the first that answers builds the model."""
    tokenizer: ImportString | None = None
    """``tokenizer(source) -> object | None``: the tokenizer that belongs to a source."""


@dataclass(frozen=True, slots=True)
class Container:
    """A file format that holds a whole checkpoint in one file, such as GGUF."""

    name: str
    suffixes: tuple[str, ...]
    """File name endings, with the dot."""
    read: ImportString
    """``read(path) -> CheckpointHeaders``: names, shapes, positions and config of the file, under
    the names and with the config that model sources know; no weight is read."""
    tokenizer: ImportString | None = None
    """``tokenizer(path) -> object | None``: the tokenizer in the file."""
    requirements: tuple[Requirement, ...] = ()
    write: ImportString | None = None
    """A subclass of :class:`quantmill.backend.ContainerWriter`; without one files are read only."""
    methods: tuple[str, ...] = ()
    """Names of the methods whose weights a file can hold."""
    importance: ImportString | None = None
    """``importance(job, measured, path)``: writes a
    :class:`quantmill.calibration.importance.Measured` as an importance matrix of the format;
    ``job`` was planned with the first of ``methods``."""
    importance_suffixes: tuple[str, ...] = ()
    """File name endings of importance matrices."""
    in_folder: tuple[str, ...] = ()
    """Names of files that are a folder's checkpoint where no safetensors are named as models' are.
    ``read`` gets the file's path; the rest of the folder (its tokenizer, say) is used as ever."""
