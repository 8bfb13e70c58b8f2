"""Architectures: a model's module tree, known from a checkpoint's headers and config.

A *model source* (a registered plugin such as the transformers integration) gives the real thing:
classes, ties, modules the architecture keeps in fp32, names that changed since the checkpoint was
written. Without one, :class:`HeaderArchitecture` derives a tree from tensor names: enough to plan
and to quantize into a checkpoint, not to build a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantmill.findings import Finding, QuantmillError, Severity, declare
from quantmill.registrations import resolve
from quantmill.targeting.roles import guess_layer, guess_role
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Part, Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.checkpoint.reader import TensorReader
    from quantmill.host import Host

__all__ = [
    "Architecture",
    "HeaderArchitecture",
    "missing_tensor",
    "open_architecture",
    "other_shape",
    "unused_tensor",
]

NO_FRAMEWORK = declare("QM-ARCH-001", "No installed framework can build this model")
FROM_HEADERS = declare(
    "QM-ARCH-002", "The module tree was derived from tensor names", Severity.WARNING
)
SHAPE_MISMATCH = declare("QM-ARCH-003", "A tensor's shape contradicts the config")
MISSING_TENSOR = declare("QM-ARCH-004", "The checkpoint lacks a tensor the model needs")
UNUSED_TENSOR = declare(
    "QM-ARCH-005", "The checkpoint has a tensor the model does not use", Severity.WARNING
)


def missing_tensor(name: str) -> Finding:
    """The checkpoint has nothing for a parameter."""
    return MISSING_TENSOR(
        name,
        "no tensor of the checkpoint becomes this parameter",
        "complete the checkpoint, or correct config.json",
    )


def other_shape(name: str, stored: Sequence[int], wanted: Sequence[int]) -> Finding:
    """The checkpoint has a parameter in another shape."""
    return SHAPE_MISMATCH(
        name,
        f"stored as {list(stored)}, the config asks for {list(wanted)}",
        "correct config.json, or take the checkpoint that belongs to it",
    )


def unused_tensor(name: str) -> Finding:
    """The model has no place for a tensor of the checkpoint."""
    return UNUSED_TENSOR(name, "the model has no such parameter", "nothing to do")


class Architecture(ABC):
    """A model without its weights."""

    source_name: str = ""
    """Name of the model source that made it."""
    dtype: str | None = None
    """Torch name of the dtype the job asks for; None for :attr:`default_dtype`."""

    elsewhere: set[str]
    """Parameters that :meth:`finish` leaves on the meta device: they come later, or live
    elsewhere. Absent where there are none."""

    @property
    @abstractmethod
    def modules(self) -> Sequence[ModuleInfo]:
        """Every module that owns parameters, in the model's order."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Full parameter name to the full name of the parameter it shares storage with."""
        return {}

    @property
    def default_dtype(self) -> str | None:
        """Torch name of the dtype the checkpoint was made for (``bfloat16``)."""
        return None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config with what it leaves to its class filled in, where somebody knows it."""
        return {}

    def module_prefix(self, module: ModuleInfo) -> str:
        """The module's name in the checkpoint, which may differ from its name in the model."""
        for local, parameter in module.parameters.items():
            if parameter.sources:
                return parameter.sources[0].removesuffix(f".{local}")
        return module.name

    def findings(self) -> list[Finding]:
        """What does not fit between the headers and the architecture."""
        return []

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh model on the meta device."""

    def assemble(self, parameter: ParameterInfo, reader: TensorReader) -> Tensor:
        """The tensor of a parameter that is made of several checkpoint tensors, or converted, or
        a part of one."""
        if len(parameter.sources) != 1:
            raise NotImplementedError(f"{parameter.name} has sources {parameter.sources}")
        if parameter.part is not None:
            return read_part(parameter.part, parameter.sources[0], reader)
        return reader.tensor(parameter.sources[0])

    def converted(self, parameter: ParameterInfo) -> bool:
        """Whether :meth:`assemble` does more than read one tensor."""
        return len(parameter.sources) != 1 or parameter.part is not None

    def finish(self, model: nn.Module, device: str) -> None:  # noqa: B027 nothing to do is fine
        """Tie weights and give buffers that no checkpoint stores their values."""

    def quantized(self, model: nn.Module, stored: Mapping[str, Any]) -> None:
        """Put the ``quantization_config`` as it is stored where the framework looks for it."""
        config = getattr(model, "config", None)
        if config is not None and not isinstance(config, Mapping):
            config.quantization_config = dict(stored)

    def dequantized(self, model: nn.Module) -> None:
        """Take back what marks ``model`` as quantized; called when it has become float again."""
        config = getattr(model, "config", None)
        if config is not None and not isinstance(config, Mapping):
            vars(config).pop("quantization_config", None)

    def float_module(self, target: Target) -> nn.Module | None:
        """A fresh module on the meta device of the class that ``target`` had before it was
        quantized; None for ``nn.Linear``."""
        return None

    def companions(self) -> list[str]:
        """Files beside the weights that a written checkpoint needs too (tokenizer, ...)."""
        return []

    weights_stem: str = "model"
    """What the framework calls weight files, without ``.safetensors``."""

    def written_config(self, config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
        """``config.json`` of a written checkpoint, whose floats are of ``dtype`` if it is given."""
        return {**config, "dtype": dtype} if dtype else config


def read_part(part: Part, source: str, reader: TensorReader) -> Tensor:
    """A part of a stacked tensor: of the stack, only this expert's slice is read."""
    import torch

    from quantmill.checkpoint.reader import torch_dtype

    header = reader.headers.tensors[source]
    shape = tuple(header.shape)[1:]
    one = torch.empty(shape, dtype=torch_dtype(header.dtype, source))
    reader.read_into(header, one, part.expert * one.numel())
    cut: Tensor = part.cut(one)
    return cut.contiguous()


COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files beside the weights that belong to a model and hold no code."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Those that make a tokenizer."""


class HeaderArchitecture(Architecture):
    """A module tree guessed from tensor names and shapes."""

    source_name = "headers"

    def __init__(self, headers: CheckpointHeaders, reason: str = "") -> None:
        self._headers = headers
        self._reason = reason
        tied = bool(headers.config.get("tie_word_embeddings"))
        self._modules = list(_modules_from(headers, tied))

    @property
    def modules(self) -> Sequence[ModuleInfo]:
        return self._modules

    @property
    def default_dtype(self) -> str | None:
        value = self._headers.config.get("dtype") or self._headers.config.get("torch_dtype")
        return str(value).removeprefix("torch.") if value else None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._headers.config

    def findings(self) -> list[Finding]:
        return [
            FROM_HEADERS(
                "model",
                self._reason or "no installed model source knows this architecture",
                "install quantmill-transformers for exact classes, ties and defaults",
            )
        ]

    def build(self) -> nn.Module:
        raise QuantmillError(
            NO_FRAMEWORK(
                "model",
                self._reason or "no installed model source knows this architecture",
                'pip install "quantmill[transformers]", or quantize into a checkpoint instead',
            )
        )

    def companions(self) -> list[str]:
        return [name for name in COMPANIONS if self._headers.source.exists(name)]


def _modules_from(headers: CheckpointHeaders, tied: bool) -> Iterator[ModuleInfo]:
    parameters: dict[str, dict[str, ParameterInfo]] = {}
    for name, header in headers.tensors.items():
        module, _, local = name.rpartition(".")
        info = ParameterInfo(name, tuple(header.shape), header.dtype, (name,))
        parameters.setdefault(module, {})[local] = info
    for module, owned in parameters.items():
        weight = owned.get("weight")
        role = guess_role(module, "")
        kind, cls = "other", "Module"
        if weight is not None and len(weight.shape) == 2:
            embedding = role == "embedding"
            kind, cls = ("embedding", "Embedding") if embedding else ("linear", "Linear")
        elif weight is not None and len(weight.shape) == 1:
            kind, cls = "norm", "Norm"
        elif any(len(item.shape) == 3 for item in owned.values()):
            kind, cls = "stacked", "Experts"
        tied_to = None
        if tied and role == "head" and weight is not None:
            tied_to = "embedding"
        yield ModuleInfo(module, kind, cls, owned, role, guess_layer(module), tied_to, False)


def open_architecture(
    host: Host, headers: CheckpointHeaders, dtype: str | None = None
) -> Architecture:
    """Ask the registered model sources, then fall back to the headers."""
    reasons: list[str] = []
    for source in host.model_sources:
        answer: Any = resolve(source.open)(headers)
        if isinstance(answer, Architecture):
            answer.source_name = source.name
            answer.dtype = dtype
            return answer
        if isinstance(answer, str):
            reasons.append(f"{source.name}: {answer}")
    return HeaderArchitecture(headers, "; ".join(reasons))
