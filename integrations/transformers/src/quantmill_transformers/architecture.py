"""Architectures of transformers as quantmill sees them: built on the meta device, no weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from quantmill.architecture import (
    COMPANIONS,
    Architecture,
)
from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.checkpoint.reader import TensorReader
from quantmill.experts import Stack, matrix_modules
from quantmill.findings import Finding, QuantmillError, declare
from quantmill.importing import without_collector
from quantmill.targeting.roles import guess_layer, guess_role
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target
from quantmill_transformers.dtypes import DtypePolicy
from quantmill_transformers.experts import Experts, find_experts
from quantmill_transformers.filling import compare, fresh_parameters
from quantmill_transformers.finish import LIBRARY, finish_model
from quantmill_transformers.names import NameMap, map_names
from quantmill_transformers.quantizer import unmark_model
from quantmill_transformers.ties import Ties

__all__ = ["TransformersArchitecture", "open_folder"]

BAD_CONFIG = declare("QM-TF-001", "transformers can't build a model from this config.json")

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def open_folder(headers: CheckpointHeaders) -> TransformersArchitecture | str | None:
    """The architecture a folder's config names; a string says why it is none of ours."""
    model_type = headers.config.get("model_type")
    names = headers.config.get("architectures") or []
    if not model_type:
        return None
    if headers.config.get("auto_map") and model_type not in CONFIG_MAPPING:
        return f"model type {model_type!r} needs code from the checkpoint, which is never run"
    if model_type not in CONFIG_MAPPING:
        return f"transformers {transformers.__version__} has no model type {model_type!r}"
    for name in names:
        with without_collector():
            cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return TransformersArchitecture(headers, cls)
    return f"transformers {transformers.__version__} has none of the classes {names}"


class TransformersArchitecture(Architecture):
    """One model class with one config."""

    def __init__(
        self,
        headers: CheckpointHeaders,
        cls: type[PreTrainedModel],
        *,
        config: Any = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """``config`` (typed, without a ``quantization_config``) is taken in place of the
        checkpoint's, and ``arguments`` go to the class beside it."""
        self._headers = headers
        self._cls = cls
        self._config = config
        self._arguments = dict(arguments or {})
        self.elsewhere: set[str] = set()
        """Parameters that stay on the meta device because they live on the disk."""
        self._stack: tuple[str, Tensor | None] = "", None
        """The stack of experts that a conversion made last."""

    @cached_property
    def config(self) -> Any:
        """The typed config, without the checkpoint's ``quantization_config``."""
        if self._config is not None:
            return self._config
        data = {k: v for k, v in self._headers.config.items() if k != "quantization_config"}
        for key in ("dtype", "torch_dtype"):
            if not isinstance(getattr(torch, str(data.get(key)), None), torch.dtype):
                data.pop(key, None)  # "auto", or nonsense: the tensors tell.
        try:
            return CONFIG_MAPPING[data["model_type"]].from_dict(copy.deepcopy(data))
        except Exception as error:
            raise QuantmillError(
                BAD_CONFIG("config.json", f"{type(error).__name__}: {error}", "correct it")
            ) from error

    @property
    def _model_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype or self.default_dtype or "float32")
        return dtype

    def build(self) -> nn.Module:
        self.ties.compare()
        return self._build()

    def _build(self) -> Any:
        # A copy for each: what one model writes into its config is nobody else's.
        config = copy.deepcopy(self.config)
        try:
            with LIBRARY, torch.device("meta"):
                model: Any = self._cls._from_config(
                    config, dtype=self._model_dtype, **self._arguments
                )
        except QuantmillError:
            raise
        except Exception as error:
            raise QuantmillError(
                BAD_CONFIG(
                    "config.json",
                    f"{self._cls.__name__} refuses it: {type(error).__name__}: {error}",
                    "correct the config, or update transformers",
                )
            ) from error
        return model

    @property
    def class_name(self) -> str:
        """The class of the model."""
        return self._cls.__name__

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device that the module tree is read from."""
        return self._build()

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers on the meta device by name, tied ones too."""
        return dict(self.skeleton.state_dict())

    @cached_property
    def names(self) -> NameMap:
        """Where each parameter comes from."""
        return map_names(self.skeleton, self._headers.tensors, self.shapes, self.experts)

    @cached_property
    def experts(self) -> Experts:
        """Stacked experts, and their matrices as modules."""
        return find_experts(self.skeleton)

    @cached_property
    def policy(self) -> DtypePolicy:
        """The dtype of each parameter."""
        return DtypePolicy(self.skeleton, self._model_dtype)

    @cached_property
    def ties(self) -> Ties:
        """Parameters that share storage."""
        packed = bool(self._headers.config.get("quantization_config"))
        return Ties(
            self.skeleton.all_tied_weights_keys,
            self.names.sources,
            self._headers,
            lambda name: packed and name.rpartition(".")[0] in self.names.beside,
        )

    @property
    def default_dtype(self) -> str | None:
        value = self._headers.config.get("dtype") or self._headers.config.get("torch_dtype")
        name = str(value).removeprefix("torch.")
        if name in _FLOATS.values():
            return name
        stored = (header.dtype for header in self._headers.tensors.values())
        return next((_FLOATS[dtype] for dtype in stored if dtype in _FLOATS), None)

    @property
    def settings(self) -> Mapping[str, Any]:
        values: Mapping[str, Any] = self.config.to_dict()
        return values

    @property
    def tied(self) -> Mapping[str, str]:
        return self.ties.mapping

    @cached_property
    def modules(self) -> Sequence[ModuleInfo]:
        model = self.skeleton
        head = model.get_output_embeddings()
        found: list[ModuleInfo] = []
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            stack = self.experts.stacks.get(name)
            own = {
                local: tensor
                for local, tensor in [*module._parameters.items(), *module._buffers.items()]
                if tensor is not None
                and prefix + local in self.shapes
                and (stack is None or local not in stack.parameters)
            }
            if stack is not None:
                found.extend(self._matrices(name, stack))
            if not own:
                continue
            parameters = {
                local: self._parameter(prefix + local, tensor, module)
                for local, tensor in own.items()
            }
            cls = type(module).__name__
            found.append(
                ModuleInfo(
                    name=name,
                    kind=_kind(name, module, own),
                    cls=cls,
                    parameters=parameters,
                    role="head" if module is head else guess_role(name, cls),
                    layer=guess_layer(name),
                    tied_to=self.ties.partner(f"{prefix}weight"),
                    keep_float=any(self._in_fp32(prefix + n, t) for n, t in own.items()),
                )
            )
        return found

    def _matrices(self, owner: str, stack: Stack) -> Iterator[ModuleInfo]:
        """Each matrix of each expert as a module."""
        names = [f"{owner}.{local}" for local in stack.parameters]
        keep_float = any(self._in_fp32(name, self.shapes[name]) for name in names)
        for module in matrix_modules(owner, stack, keep_float):
            own = {local: self._matrix(parameter) for local, parameter in module.parameters.items()}
            yield replace(module, parameters=own)

    def _matrix(self, parameter: ParameterInfo) -> ParameterInfo:
        """A tensor of one expert: on its own in the checkpoint, or a part of a stack."""
        part = parameter.part
        assert part is not None
        sources, stack = self.names.sources(parameter.name), f"{part.module}.{part.parameter}"
        if sources:
            part = None
        else:
            sources = self.names.sources(stack)
        header = self._headers.tensors.get(sources[0]) if sources else None
        dtype = header.dtype if header is not None else _DTYPES.get(self.shapes[stack].dtype, "F32")
        return replace(parameter, dtype=dtype, sources=sources, part=part if sources else None)

    def _in_fp32(self, name: str, meta: Tensor) -> bool:
        wanted = self.policy.of(name, meta)
        return wanted == torch.float32 != self._model_dtype

    def _parameter(self, name: str, tensor: Tensor, module: nn.Module) -> ParameterInfo:
        sources = self.names.sources(name)
        header = self._headers.tensors.get(sources[0]) if sources else None
        dtype = header.dtype if header is not None else _DTYPES.get(tensor.dtype, "F32")
        transposed = tensor.ndim == 3 and bool(getattr(module, "is_transposed", False))
        return ParameterInfo(name, tuple(tensor.shape), dtype, sources, transposed)

    def module_prefix(self, module: ModuleInfo) -> str:
        """A module made by a conversion has no name of its own in the checkpoint: what is written
        for it goes under the model's name, which the library reads as well."""
        for local, parameter in module.parameters.items():
            source = self.names.plain.get(parameter.name)
            if parameter.part is not None:
                # The stack's module has a name in the checkpoint, or the model's.
                stack = parameter.part
                source = self.names.plain.get(f"{stack.module}.{stack.parameter}", "")
                owner = source.removesuffix(f".{stack.parameter}")
                kept = source.endswith(f".{stack.parameter}")
                return (owner if kept else stack.module) + module.name[len(stack.module) :]
            # A renaming may change the last component too (gamma, beta): that is no prefix.
            if source is not None and (source == local or source.endswith(f".{local}")):
                return source.removesuffix(local).removesuffix(".")
        return self.names.beside.get(module.name, module.name)

    def findings(self) -> list[Finding]:
        return compare(self)

    @cached_property
    def fresh(self) -> frozenset[str]:
        """See :func:`quantmill_transformers.filling.fresh_parameters`."""
        return fresh_parameters(self)

    def converted(self, parameter: ParameterInfo) -> bool:
        return parameter.part is not None or self._made(parameter) in self.names.conversions

    def _made(self, parameter: ParameterInfo) -> str:
        """The parameter of the float model that a tensor is, or is a part of."""
        name = parameter.name
        if name in self.names.plain:
            return name
        module, _, local = name.rpartition(".")
        if module not in self.experts.named:
            return name
        owner, _, matrix = self.experts.named[module]
        return f"{owner}.{matrix.parameter if local == 'weight' else matrix.bias}"

    def assemble(self, parameter: ParameterInfo, reader: TensorReader) -> Tensor:
        name = self._made(parameter)
        conversion = self.names.conversions.get(name)
        if conversion is None:
            return super().assemble(parameter, reader)
        if parameter.part is None:
            return conversion.run(name, self.skeleton, reader)
        if self._stack[0] != name:
            # Its parts are asked for one after another.
            self._stack = name, conversion.run(name, self.skeleton, reader)
        part: Tensor = parameter.part.of(self._stack[1])
        return part.contiguous()

    def float_module(self, target: Target) -> nn.Module | None:
        if target.module.parts:
            return None
        module: nn.Module = copy.deepcopy(self.skeleton.get_submodule(target.name))
        return module

    def finish(self, model: nn.Module, device: str) -> None:
        finish_model(self, model, device)

    def dequantized(self, model: nn.Module) -> None:
        super().dequantized(model)
        unmark_model(model)

    @property
    def headers(self) -> CheckpointHeaders:
        """The checkpoint it was opened from."""
        return self._headers

    def companions(self) -> list[str]:
        return [name for name in COMPANIONS if self._headers.source.exists(name)]


def _kind(name: str, module: nn.Module, own: Mapping[str, Tensor]) -> str:
    if isinstance(module, Conv1D):
        return "conv1d"
    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    cls = type(module).__name__.lower()
    # Position embeddings and weights of convolutions have three dimensions too.
    experts = "expert" in cls or name.rpartition(".")[2] == "experts"
    if experts and any(tensor.ndim == 3 for tensor in own.values()):
        return "stacked"
    return "norm" if "norm" in cls else "other"
