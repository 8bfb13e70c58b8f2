"""What targeting works on: modules, targets, rules and decisions, all of them data.

A model source describes its module tree with :class:`ModuleInfo` (from headers and the
architecture on the meta device; no weights are read). Rules come from the user, the checkpoint,
plugins, the architecture and the defaults. :func:`quantmill.targeting.decide` joins the two into
one :class:`Decision` for every module, and :func:`targets_of` says which matrices a module has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

__all__ = [
    "ACTIONS",
    "FLOAT_DTYPES",
    "KINDS",
    "ROLES",
    "TARGET_KINDS",
    "Action",
    "Decision",
    "ModuleInfo",
    "Outcome",
    "ParameterInfo",
    "Part",
    "Rule",
    "Target",
    "targets_of",
]

Action = Literal["include", "skip", "assign", "configure"]
"""``include``: quantize with the job's method; ``assign``: with the rule's; ``skip``: keep;
``configure``: change the options of what is quantized anyway."""
Outcome = Literal["quantize", "keep", "not-a-target"]

ACTIONS: Final = ("include", "skip", "assign", "configure")
TARGET_KINDS: Final = ("linear", "conv1d", "embedding", "stacked")
"""Kinds of modules that hold a weight a method may quantize."""
KINDS: Final = (*TARGET_KINDS, "norm", "other")
ROLES: Final = ("attention", "mlp", "head", "embedding", "norm", "expert", "router")
FLOAT_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Safetensors codes of the dtypes a weight can be quantized from."""


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix of a stacked parameter (an expert's, or a half of it), or a row of its biases."""

    module: str
    """Dotted path of the module that has the stacked parameter."""
    parameter: str
    """Its local name there."""
    expert: int
    rows: tuple[int, int, int]
    """Start, stop and step of the output features."""
    transposed: bool = False
    """The stack is ``[experts, in, out]``."""

    def of(self, stack: Any) -> Any:
        """The view ``[out, in]`` of a stack ``[experts, ...]``, or ``[out]`` of stacked biases."""
        return self.cut(stack[self.expert])

    def cut(self, one: Any) -> Any:
        """The same of the stack's slice for this expert."""
        return (one.transpose(0, 1) if self.transposed else one)[slice(*self.rows)]


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of a module, known from headers."""

    name: str
    """Full dotted name in the model, e.g. ``model.layers.0.mlp.up_proj.weight``."""
    shape: tuple[int, ...]
    dtype: str
    """Safetensors code: ``BF16``, ``F32``, ..."""
    sources: tuple[str, ...] = ()
    """Names of the checkpoint tensors it is made of; several when names were converted or
    experts stacked, none when the checkpoint does not have it (a tied weight)."""
    transposed: bool = False
    """The last two dimensions are stored ``[in, out]`` (some stacked experts). A ``conv1d``
    module is transposed in any case."""
    part: Part | None = None
    """Its source holds all experts, and it is this part of it."""


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module of the model that owns parameters. The root (``''``) is not listed."""

    name: str
    """Dotted path in the model."""
    kind: str
    """``linear``, ``conv1d``, ``embedding``, ``stacked``, ``norm`` or ``other``."""
    cls: str
    """Name of its class, e.g. ``Linear``."""
    parameters: Mapping[str, ParameterInfo]
    """By local name, e.g. ``weight``."""
    role: str | None = None
    """``attention``, ``mlp``, ``head``, ``embedding``, ``norm``, ``expert`` or ``router``."""
    layer: int | None = None
    """Index of the block it is in."""
    tied_to: str | None = None
    """Full name of the parameter it shares its weight with."""
    keep_float: bool = False
    """The architecture keeps it in fp32."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """For one matrix of a mixture's experts: where the float model keeps its parameters, by local
    name. It has no module of its own there; see :mod:`quantmill.experts`."""


@dataclass(frozen=True, slots=True)
class Target:
    """A weight to quantize, and how to view it as ``[out, in]`` (``[experts, out, in]``)."""

    module: ModuleInfo
    parameter: str
    """Local name of the parameter, ``weight`` unless stacked."""
    kind: str
    out_features: int
    in_features: int
    experts: int | None = None
    """Number of slices of a stacked parameter; None for a plain matrix."""
    transposed: bool = False
    """Stored ``[in, out]`` (Conv1D) or ``[experts, in, out]``."""
    note: str = ""
    """What a quantized checkpoint's ``__metadata__`` says under the weight's name, if anything."""

    @property
    def name(self) -> str:
        """The dotted path of the module."""
        return self.module.name

    @property
    def weight_name(self) -> str:
        """The full name of the parameter in the model."""
        return self.module.parameters[self.parameter].name

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        return self.out_features * self.in_features * (self.experts or 1)


def targets_of(module: ModuleInfo) -> list[Target]:
    """The targets of a module, whatever the rules say of it.

    ``linear``, ``conv1d`` and ``embedding`` have their two-dimensional float ``weight`` (an
    embedding is ``[rows, width]``); ``stacked`` has each of its three-dimensional float
    parameters, one target with ``experts`` slices apiece.
    """
    if module.kind not in TARGET_KINDS:
        return []
    stacked = module.kind == "stacked"
    found: list[Target] = []
    for local, parameter in module.parameters.items():
        shape = parameter.shape
        if len(shape) != (3 if stacked else 2) or not (stacked or local == "weight"):
            continue
        if parameter.dtype not in FLOAT_DTYPES or 0 in shape:
            continue
        transposed = module.kind == "conv1d" or parameter.transposed
        rows, columns = shape[-2:]
        if transposed:
            rows, columns = columns, rows
        experts = shape[0] if stacked else None
        found.append(Target(module, local, module.kind, rows, columns, experts, transposed))
    return found


@dataclass(frozen=True, slots=True)
class Rule:
    """One statement about the modules that a pattern matches."""

    pattern: str
    """In the language of :mod:`quantmill.targeting.patterns`."""
    action: Action
    origin: str
    """``user``, ``checkpoint``, ``plugin:<name>``, ``architecture`` or ``default``."""
    method: str | None = None
    """Label of the method that ``assign`` gives."""
    reason: str = ""
    """Why, for people; shown with each decision the rule makes."""
    options: Mapping[str, Any] | None = None
    """Config fields of the method to override for these modules."""
    order: int = 0
    """Order within one origin, for dialects where it decides ("the first match wins"): the
    higher one wins before specificity is looked at. Rules written in our language leave it 0."""
    optional: bool = False
    """May match nothing without a finding."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"a rule's action is one of {ACTIONS}, not {self.action!r}")
        if self.action == "assign" and self.method is None:
            raise ValueError(f"rule {self.pattern!r} assigns no method")


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one module, and why."""

    module: str
    action: Outcome
    method: str | None
    """Label of the method that quantizes it; None for the job's only one, or when it is kept."""
    reason: str
    origin: str
    """Who decided: the origin of the rule; ``default`` where no rule spoke; ``architecture``
    and ``method`` for what cannot or must not be quantized."""
    rule: Rule | None = None
    options: Mapping[str, Any] | None = None
    """Fields of the method's config that differ for this module."""
