"""Architectures of transformers as quantmill sees them: built on the meta device, no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from quantmill.architecture import (
    COMPANIONS,
    MISSING_TENSOR,
    SHAPE_MISMATCH,
    UNUSED_TENSOR,
    Architecture,
)
from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.checkpoint.reader import TensorReader
from quantmill.findings import Finding, QuantmillError, declare
from quantmill.targeting.roles import guess_layer, guess_role
from quantmill.targeting.types import ModuleInfo, ParameterInfo
from quantmill_transformers.names import NameMap, map_names

__all__ = ["TransformersArchitecture", "open_folder"]

BAD_CONFIG = declare("QM-TF-001", "transformers can't build a model from this config.json")

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


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
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return TransformersArchitecture(headers, cls)
    return f"transformers {transformers.__version__} has none of the classes {names}"


class TransformersArchitecture(Architecture):
    """One model class with one config."""

    def __init__(self, headers: CheckpointHeaders, cls: type[PreTrainedModel]) -> None:
        self._headers = headers
        self._cls = cls
        self._findings: list[Finding] = []

    @cached_property
    def config(self) -> Any:
        """The typed config, without the checkpoint's ``quantization_config``."""
        data = {k: v for k, v in self._headers.config.items() if k != "quantization_config"}
        try:
            return CONFIG_MAPPING[data["model_type"]].from_dict(data)
        except Exception as error:
            raise QuantmillError(
                BAD_CONFIG("config.json", f"{type(error).__name__}: {error}", "correct it")
            ) from error

    def build(self) -> nn.Module:
        dtype = getattr(torch, self.default_dtype or "float32")
        try:
            with torch.device("meta"), _DefaultDtype(dtype):
                model: nn.Module = self._cls._from_config(self.config)
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

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device that the module tree is read from."""
        return self.build()

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers on the meta device by name, tied ones too."""
        return dict(self.skeleton.state_dict())

    @cached_property
    def names(self) -> NameMap:
        """Where each parameter comes from."""
        return map_names(self.skeleton, self._headers.tensors, self.shapes)

    @property
    def default_dtype(self) -> str | None:
        value = self._headers.config.get("dtype") or self._headers.config.get("torch_dtype")
        if value in (None, "auto"):
            kinds = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
            for header in self._headers.tensors.values():
                if header.dtype in kinds:
                    return kinds[header.dtype]
            return None
        return str(value).removeprefix("torch.")

    @cached_property
    def tied(self) -> Mapping[str, str]:
        mapping = dict(getattr(self.skeleton, "all_tied_weights_keys", {}) or {})
        # Tying is symmetric on disk: whichever of the two is stored is the source.
        return {
            (source if target in self.names.plain and source not in self.names.plain else target): (
                target if target in self.names.plain and source not in self.names.plain else source
            )
            for target, source in mapping.items()
        }

    def _keeps_float(self, name: str) -> bool:
        kept = set(getattr(self.skeleton, "_keep_in_fp32_modules_strict", None) or ())
        if self.default_dtype == "float16":
            kept |= set(getattr(self.skeleton, "_keep_in_fp32_modules", None) or ())
        return any(re.search(rf"(^|\.){key}(\.|$)", name) for key in kept)

    @cached_property
    def modules(self) -> Sequence[ModuleInfo]:
        model = self.skeleton
        heads = {id(model.get_output_embeddings())} if model.get_output_embeddings() else set()
        partners = {**self.tied, **{source: target for target, source in self.tied.items()}}
        found = []
        for name, module in model.named_modules():
            own = [*module.named_parameters(recurse=False)]
            persistent = [
                (local, buffer)
                for local, buffer in module.named_buffers(recurse=False)
                if local not in module._non_persistent_buffers_set
            ]
            if not own and not persistent:
                continue
            parameters = {
                local: self._parameter(f"{name}.{local}" if name else local, tensor)
                for local, tensor in [*own, *persistent]
            }
            kind = _kind(module, parameters)
            cls = type(module).__name__
            role = "head" if id(module) in heads else guess_role(name, cls)
            tied_to = partners.get(f"{name}.weight")
            found.append(
                ModuleInfo(
                    name,
                    kind,
                    cls,
                    parameters,
                    role,
                    guess_layer(name),
                    tied_to,
                    self._keeps_float(name),
                )
            )
        return found

    def _parameter(self, name: str, tensor: Tensor) -> ParameterInfo:
        sources = self.names.sources(name)
        header = self._headers.tensors.get(sources[0]) if sources else None
        dtype = header.dtype if header is not None else _DTYPES.get(tensor.dtype, "F32")
        return ParameterInfo(name, tuple(tensor.shape), dtype, sources)

    def findings(self) -> list[Finding]:
        quantized = bool(self._headers.config.get("quantization_config"))
        found = []
        ignored = getattr(self.skeleton, "_keys_to_ignore_on_load_missing", None) or ()
        for name, tensor in self.shapes.items():
            sources = self.names.sources(name)
            if not sources:
                if name in self.tied or any(re.search(item, name) for item in ignored):
                    continue
                found.append(
                    MISSING_TENSOR(
                        name,
                        "no tensor of the checkpoint becomes this parameter",
                        "complete the checkpoint, or correct config.json",
                    )
                )
            elif name in self.names.plain and not quantized:
                stored = tuple(self._headers.tensors[sources[0]].shape)
                if stored != tuple(tensor.shape):
                    found.append(
                        SHAPE_MISMATCH(
                            name,
                            f"stored as {list(stored)}, the config asks for {list(tensor.shape)}",
                            "correct config.json, or take the checkpoint that belongs to it",
                        )
                    )
        allowed = getattr(self.skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in self.names.unused:
            known = any(re.search(item, name) for item in allowed) or "rotary_emb.inv_freq" in name
            belongs = quantized and self._is_statistic(name)
            if not known and not belongs:
                found.append(
                    UNUSED_TENSOR(name, "the model has no such parameter", "nothing to do")
                )
        return found

    @cached_property
    def _stored_weights(self) -> set[str]:
        return {source.rpartition(".")[0] for source in self.names.plain.values()}

    def _is_statistic(self, name: str) -> bool:
        """Whether a tensor lies beside a quantized weight (scales, absmax, ...)."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self._stored_weights for end in range(1, len(parts)))

    def converted(self, parameter: ParameterInfo) -> bool:
        return parameter.name in self.names.conversions

    def assemble(self, parameter: ParameterInfo, reader: TensorReader) -> Tensor:
        conversion = self.names.conversions.get(parameter.name)
        if conversion is not None:
            return conversion.run(parameter.name, self.skeleton, reader)
        return reader.tensor(parameter.sources[0])

    def finish(self, model: nn.Module, device: str) -> None:
        base: Any = model
        for module in model.modules():
            pending = any(
                buffer.is_meta for buffer in module._buffers.values() if buffer is not None
            )
            module._is_hf_initialized = not pending  # type: ignore[assignment]
        for name, buffer in list(base.named_non_persistent_buffers()):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = torch.empty_like(buffer, device=device)
        # Only modules with buffers that no checkpoint stores are left to initialise.
        base.initialize_weights()
        missing = set(self.tied)
        base.tie_weights(missing_keys=missing, recompute_mapping=False)
        if base.can_generate() and self._headers.generation_config:
            base.generation_config = GenerationConfig.from_dict(
                dict(self._headers.generation_config)
            )
        base.config._name_or_path = self._headers.source.describe()
        model.eval()

    def companions(self) -> list[str]:
        return [name for name in COMPANIONS if self._headers.source.exists(name)]


def _kind(module: nn.Module, parameters: Mapping[str, ParameterInfo]) -> str:
    if isinstance(module, Conv1D):
        return "conv1d"
    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(len(item.shape) == 3 for item in parameters.values()) and not isinstance(
        module, nn.Conv1d
    ):
        return "stacked"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "other"


class _DefaultDtype:
    """Build parameters in a dtype, restoring the process's default afterwards."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self._before)
