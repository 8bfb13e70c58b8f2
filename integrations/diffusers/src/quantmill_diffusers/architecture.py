"""Components of a pipeline as quantmill sees them: built on the meta device, no weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn

from quantmill.architecture import missing_tensor, other_shape, unused_tensor
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.findings import Finding, QuantmillError, declare
from quantmill.modules import ModuleArchitecture
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Rule

__all__ = ["DiffusersArchitecture", "open_component", "rules_of"]

BAD_CONFIG = declare("QM-DIFF-001", "diffusers can't build a model from this config.json")
OLD_LAYOUT = declare("QM-DIFF-002", "Tensors of an older layout can't be converted")

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LIBRARY = Lock()
"""Held while a model is built: torch's default dtype and ``register_parameter`` are those of the
whole process."""


def open_component(headers: CheckpointHeaders) -> DiffusersArchitecture | str:
    """The architecture that the ``_class_name`` of a component's config names."""
    name = str(headers.config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, ModelMixin):
        return DiffusersArchitecture(headers, cls)
    return f"diffusers {diffusers.__version__} has no model class {name!r}"


class DiffusersArchitecture(ModuleArchitecture):
    """One model class with one config."""

    weights_stem = "diffusion_pytorch_model"

    def __init__(self, headers: CheckpointHeaders, cls: type[ModelMixin]) -> None:
        self._headers = headers
        self._cls = cls
        super().__init__(self._build(torch.float32))

    def _build(self, dtype: torch.dtype) -> nn.Module:
        config = {k: v for k, v in self._headers.config.items() if k != "quantization_config"}
        with _LIBRARY:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                # Buffers get their values here: what no checkpoint stores is computed.
                with init_empty_weights(include_buffers=False):
                    model: nn.Module = self._cls.from_config(copy.deepcopy(config))
            except Exception as error:
                raise QuantmillError(
                    BAD_CONFIG(
                        "config.json",
                        f"{self._cls.__name__} refuses it: {type(error).__name__}: {error}",
                        "correct the config, or update diffusers",
                    )
                ) from error
            finally:
                torch.set_default_dtype(before)
        return model

    def build(self) -> nn.Module:
        model = self._build(getattr(torch, self.dtype or self.default_dtype or "float32"))
        for name, owner in self.tied.items():
            module, _, local = name.rpartition(".")
            model.get_submodule(module)._parameters[local] = model.get_parameter(owner)
        return model

    @cached_property
    def _names(self) -> tuple[dict[str, str], str]:
        """Parameter to tensor, through the library's own renaming; why that failed, if so."""
        names = OrderedDict((name, name) for name in self._headers.tensors)
        try:
            self.module._fix_state_dict_keys_on_load(names)  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 classes override it, and expect tensors
            there = {name: name for name in self._headers.tensors}
            return there, f"{type(error).__name__}: {error}".splitlines()[0]
        return dict(names), ""

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name."""
        return dict(self.module.state_dict())

    @cached_property
    def _kept(self) -> frozenset[str]:
        return frozenset(self._cls._keep_in_fp32_modules or ())

    @cached_property
    def _all(self) -> list[ModuleInfo]:
        found = {item.name: self._located(item) for item in super().modules}
        for name, part in self.module.named_modules():
            prefix = f"{name}." if name else ""
            buffers = {
                local: ParameterInfo(prefix + local, tuple(tensor.shape), code_of(tensor.dtype))
                for local, tensor in part._buffers.items()
                if tensor is not None and prefix + local in self._stored
            }
            if not buffers:
                continue
            info = found.get(name)
            if info is None:
                info = ModuleInfo(name, "other", type(part).__name__, {})
            merged = replace(info, parameters={**info.parameters, **buffers})
            found[name] = self._located(merged)
        return list(found.values())

    def _located(self, info: ModuleInfo) -> ModuleInfo:
        """With the tensors that its parameters are read from."""
        names, headers = self._names[0], self._headers.tensors
        parameters = {}
        for local, parameter in info.parameters.items():
            source = names.get(parameter.name)
            if source is None:
                parameters[local] = replace(parameter, sources=())
            else:
                dtype = headers[source].dtype
                parameters[local] = replace(parameter, sources=(source,), dtype=dtype)
        keep = any(self._in_fp32(parameter.name) for parameter in parameters.values())
        return replace(info, parameters=parameters, keep_float=keep)

    def _in_fp32(self, name: str) -> bool:
        return not self._kept.isdisjoint(name.split("."))

    @property
    def modules(self) -> Sequence[ModuleInfo]:
        return self._all

    @property
    def default_dtype(self) -> str | None:
        stored = (header.dtype for header in self._headers.tensors.values())
        return next((_FLOATS[dtype] for dtype in stored if dtype in _FLOATS), None)

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = dict(self.module.config)  # type: ignore[arg-type]
        return settings

    def module_prefix(self, module: ModuleInfo) -> str:
        return module.name  # Of old names, the library converts those of float weights only.

    def findings(self) -> list[Finding]:
        names, problem = self._names
        quantized = bool(self._headers.config.get("quantization_config"))
        found = []
        if problem:
            found.append(
                OLD_LAYOUT(
                    self._cls.__name__,
                    f"diffusers' own conversion needs the weights at once: {problem}",
                    "load it with diffusers alone and save it again",
                )
            )
        owners = {name.rpartition(".")[0] for name in self._stored}
        beside = {name.rpartition(".")[0] for name in names if name not in self._stored}
        for name, tensor in self._stored.items():
            module = name.rpartition(".")[0]
            source = names.get(name)
            if source is None:
                if name not in self.tied and not (quantized and module in beside):
                    found.append(missing_tensor(name))
                continue
            stored, wanted = tuple(self._headers.tensors[source].shape), tuple(tensor.shape)
            if stored != wanted and not (quantized and len(wanted) != 1):
                found.append(other_shape(name, stored, wanted))
        ignored = self._cls._keys_to_ignore_on_load_unexpected or ()
        for name in names:
            known = name in self._stored or any(item in name for item in ignored)
            if known or (quantized and _within(name, owners)):
                continue
            found.append(unused_tensor(name))
        return found

    def finish(self, model: nn.Module, device: str) -> None:
        super().finish(model, device)
        wanted = getattr(torch, self.dtype or self.default_dtype or "float32")
        for info in self.modules:
            # A module with any parameter in fp32 was read in fp32 as a whole; others go back.
            for parameter in info.parameters.values() if info.keep_float else ():
                if not self._in_fp32(parameter.name):
                    module, _, local = parameter.name.rpartition(".")
                    owner = model.get_submodule(module)
                    tensor = owner._parameters.get(local, owner._buffers.get(local))
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(wanted)
        model.eval()
        recorded: Any = model
        recorded.register_to_config(_name_or_path=self._headers.source.describe())

    def quantized(self, model: nn.Module, stored: Mapping[str, Any]) -> None:
        recorded: Any = model
        recorded.register_to_config(quantization_config=copy.deepcopy(dict(stored)))

    def dequantized(self, model: nn.Module) -> None:
        from quantmill_diffusers.quantizer import unmark_model

        unmark_model(model)

    def written_config(self, config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
        return config  # The class takes every key for an argument of its own.


def _within(name: str, owners: Iterable[str]) -> bool:
    return any(name[:end] in owners for end, char in enumerate(name) if char == ".")


def rules_of(architecture: Any) -> list[Rule]:
    """Modules that the class keeps in fp32 are kept from quantizers, as diffusers' own do."""
    assert isinstance(architecture, DiffusersArchitecture)
    return [
        Rule(
            item.name,
            "skip",
            "architecture",
            reason="the architecture keeps it from quantizers",
            optional=True,
        )
        for item in architecture.modules
        if item.keep_float and item.name
    ]
