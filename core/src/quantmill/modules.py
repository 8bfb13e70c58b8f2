"""Any ``nn.Module`` as a source: its tensors in memory in place of a checkpoint's files.

The stages do not notice: the module is described by the same headers and the same tree, and
:class:`ModuleSink` replaces linears in the module itself. A weight is let go as soon as its form is
there; what stays float is the same ``nn.Parameter`` as before.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantmill.architecture import Architecture
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.checkpoint.reader import TensorReader, torch_dtype
from quantmill.experts import locate, matrix_modules, stack_of
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Form
from quantmill.job import Job, Selection
from quantmill.kept import KeptLinear
from quantmill.stages.replace import ModelSink
from quantmill.targeting.roles import guess_layer, guess_role
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target

__all__ = [
    "MemoryReader",
    "MemorySource",
    "ModuleArchitecture",
    "ModuleSink",
    "headers_of",
    "not_quantized",
]

NO_WEIGHTS = declare("QM-MODULE-001", "A module has parameters without values")
ALREADY = declare("QM-MODULE-002", "A module is quantized already")
IS_TARGET = declare("QM-MODULE-003", "A module can't be replaced by itself")


_SHORTCUTS: Final = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""What PyTorch's fused layers ask before they are used, and the answer that means no."""


class MemorySource:
    """A source without files: the parameters of a module, by name."""

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name = name
        self.parameters = dict(parameters)

    def reader(self, headers: CheckpointHeaders) -> MemoryReader:
        """What reads its tensors."""
        return MemoryReader(headers, self.parameters)

    def names(self) -> list[str]:
        """No files."""
        return []

    def exists(self, name: str) -> bool:
        """Never."""
        return False

    def size(self, name: str) -> int:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(name)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(name)

    def local_path(self, name: str) -> Path:
        """Raises FileNotFoundError."""
        raise FileNotFoundError(name)

    def describe(self) -> str:
        """The class of the module."""
        return self.name

    def identity(self) -> str:
        """Of this object: memory has no other."""
        return f"{self.name} at {id(self):x}"


class MemoryReader:
    """Reads like :class:`quantmill.checkpoint.reader.TensorReader`, from memory."""

    def __init__(self, headers: CheckpointHeaders, parameters: Mapping[str, nn.Parameter]) -> None:
        self.headers = headers
        self._parameters = parameters

    def __enter__(self) -> MemoryReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""

    def tensor(self, name: str) -> Tensor:
        """The tensor itself, on its device."""
        return self._parameters[name].detach()

    def mapped(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._parameters[name].detach()

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Copy elements into ``out``."""
        flat = self.tensor(header.name).reshape(-1)
        out.copy_(flat[start_elem : start_elem + out.numel()].reshape(out.shape))

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, rows)``."""
        whole = self.tensor(name)
        for start in range(0, whole.shape[0], max(1, rows)):
            yield start, whole[start : start + rows]


def not_quantized(module: nn.Module) -> None:
    """Raise QuantmillError where quantmill has quantized the module already."""
    if getattr(module, "quantmill_job", None) is not None:
        fix = "dequantize_model(module) first; several methods go into one call, by assign"
        raise QuantmillError(ALREADY(type(module).__name__, "quantmill has quantized it", fix))


def headers_of(module: nn.Module) -> CheckpointHeaders:
    """Headers of a module's parameters; tied ones appear under their first name.

    Raises:
        QuantmillError: a parameter has no values, or the module is quantized already.
    """
    not_quantized(module)
    headers: dict[str, TensorHeader] = {}
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        lazy = isinstance(parameter, nn.UninitializedParameter)
        if lazy or parameter.is_meta:
            cause = "it has no shape yet" if lazy else "it is on the meta device"
            fix = "run the module once" if lazy else "give it values, or load_into(module, file)"
            raise QuantmillError(NO_WEIGHTS(name, cause, fix))
        size = parameter.numel() * parameter.element_size()
        headers[name] = TensorHeader(
            name, code_of(parameter.dtype), tuple(parameter.shape), "", 0, size
        )
    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    known = {} if vocabulary is None else {"vocab_size": vocabulary}
    source = MemorySource(type(module).__name__, parameters)
    return CheckpointHeaders(headers, {}, {}, known, None, source)


class ModuleArchitecture(Architecture):
    """The tree of a live module. Building gives that module: it is changed in place."""

    source_name = "module"

    def __init__(self, module: nn.Module, stored: Collection[str] = ()) -> None:
        """``stored`` are the names of the tensors in a file that the weights come from."""
        self.module = module
        self._apart = {name.rpartition(".")[0] for name in stored}
        self.aliases: dict[str, list[str]] = {}
        """Further names of modules that occur at several places."""
        paths: dict[nn.Module, str] = {}
        for path, part in module.named_modules(remove_duplicate=False):
            if paths.setdefault(part, path) != path:
                self.aliases.setdefault(paths[part], []).append(path)
        self.before: dict[str, nn.Module] = {}
        """What stood where a target's module is now, without its weights."""
        self._closed: list[tuple[nn.Module, str, Any]] = []
        first: dict[int, str] = {}
        self._tied: dict[str, str] = {}
        for path, part in module.named_modules():
            for local, parameter in part._parameters.items():
                if parameter is None:
                    continue
                name = f"{path}.{local}" if path else local
                owner = first.setdefault(id(parameter), name)
                if owner != name:
                    self._tied[name] = owner
        self._modules = [info for pair in module.named_modules() for info in self._infos(*pair)]

    def _infos(self, name: str, part: nn.Module) -> Iterator[ModuleInfo]:
        """The module itself, and for experts in stacks each of their matrices."""
        stack = stack_of(part)
        if stack is not None:
            for info in matrix_modules(name, stack):
                apart = any(stored.startswith(info.name) for stored in self._apart)
                own = {
                    local: self._matrix(item, f"{info.name}.{local}" if apart else "")
                    for local, item in info.parameters.items()
                }
                yield replace(info, parameters=own)
        stacked = () if stack is None else stack.parameters
        if any(p is not None and key not in stacked for key, p in part._parameters.items()):
            yield self._info(name, part, stacked)

    def _matrix(self, info: ParameterInfo, stored: str) -> ParameterInfo:
        """A matrix of a stack in memory; ``stored`` is its own name in a file that has it so."""
        assert info.part is not None
        name = f"{info.part.module}.{info.part.parameter}".removeprefix(".")
        dtype = code_of(self.module.get_parameter(name).dtype)
        if stored:
            return replace(info, dtype=dtype, sources=(stored,), part=None)
        return replace(info, dtype=dtype, sources=(self._tied.get(name, name),))

    def _info(self, name: str, part: nn.Module, without: Collection[str]) -> ModuleInfo:
        parameters = {}
        for local, parameter in part._parameters.items():
            if parameter is None or local in without:
                continue
            full = f"{name}.{local}" if name else local
            sources = () if full in self._tied else (full,)
            parameters[local] = ParameterInfo(
                full, tuple(parameter.shape), code_of(parameter.dtype), sources
            )
        cls = type(part).__name__
        kind = "other"
        if _is_linear(part):
            kind = "linear"
        elif cls == "Conv1D" and "weight" in parameters and len(parameters["weight"].shape) == 2:
            kind = "conv1d"
        elif isinstance(part, nn.Embedding):
            kind = "embedding"
        elif "norm" in cls.lower():
            kind = "norm"
        elif "expert" in cls.lower() and any(len(p.shape) == 3 for p in parameters.values()):
            kind = "stacked"
        tied_to = self._tied.get(f"{name}.weight")
        # A weight that another module shares is tied from both sides.
        if tied_to is None and f"{name}.weight" in self._tied.values():
            tied_to = next(a for a, b in self._tied.items() if b == f"{name}.weight")
        role = guess_role(name, cls)
        return ModuleInfo(name, kind, cls, parameters, role, guess_layer(name), tied_to)

    @property
    def modules(self) -> Sequence[ModuleInfo]:
        return self._modules

    @property
    def tied(self) -> Mapping[str, str]:
        return self._tied

    @property
    def default_dtype(self) -> str | None:
        floats = [p.dtype for p in self.module.parameters() if p.is_floating_point()]
        known = (torch.float32, torch.bfloat16, torch.float16)
        found = next((dtype for dtype in floats if dtype in known), torch.float32)
        return str(found).removeprefix("torch.")

    def build(self) -> nn.Module:
        return self.module

    def replaced(self, name: str) -> None:
        """A module was replaced: under its other names too."""
        for alias in self.aliases.get(name, ()):
            self.module.set_submodule(alias, self.module.get_submodule(name))

    def close_shortcuts(self, name: str) -> None:
        """Keep PyTorch's fused transformer layers from reading the weight of ``name`` themselves:
        in eval mode they call no module and take any weight for a float one."""
        part = self.module
        for step in ("", *name.split(".")[:-1]):
            part = part if not step else part.get_submodule(step)
            for kind, attribute, off in _SHORTCUTS:
                if isinstance(part, kind) and getattr(part, attribute, off) != off:
                    self._closed.append((part, attribute, getattr(part, attribute)))
                    setattr(part, attribute, off)

    def float_module(self, target: Target) -> nn.Module | None:
        return self.before.get(target.name)

    def dequantized(self, model: nn.Module) -> None:
        for name, before in self.before.items():
            self.replaced(name)
            part = model.get_submodule(name)
            for local, parameter in before._parameters.items():
                found = part._parameters.get(local)
                if parameter is not None and found is not None:
                    found.requires_grad_(parameter.requires_grad)
        self.before.clear()
        while self._closed:
            setattr(*self._closed.pop())

    def finish(self, model: nn.Module, device: str) -> None:
        # Ties break where a parameter was put anew: join them again.
        for name, owner in self._tied.items():
            module, _, local = name.rpartition(".")
            shared: Any = model.get_parameter(owner)
            model.get_submodule(module)._parameters[local] = shared
        if device != "cpu":
            for part in model.modules():
                for name, buffer in part._buffers.items():
                    part._buffers[name] = None if buffer is None else buffer.to(device)


class ModuleSink(ModelSink):
    """Changes a live module: targets give way to the method's modules, all else stays as it is.

    The memory of a weight is free once its form is there, unless somebody outside of the module
    holds it.
    """

    def __init__(self, job: Job, module: nn.Module, architecture: ModuleArchitecture) -> None:
        super().__init__(job, module, architecture)
        self.module = module
        self.tree = architecture
        source = job.headers.source
        self._parameters = source.parameters if isinstance(source, MemorySource) else {}
        infos = [item for part in architecture.modules for item in part.parameters.values()]
        self._wanted = Counter(name for item in infos for name in item.sources)

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        old = self.module.get_submodule(target.name)
        self.tree.before[target.name] = _without_weights(old)
        weight = target.module.parameters[target.parameter]
        # Activations of a module in several dtypes have that of the weight they meet.
        self.dtype = form.dtype
        super().put_form(selection, target, form, bias)
        new = self.module.get_submodule(target.name)
        if new is not old:
            for store in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
                getattr(new, store).update(getattr(old, store))
        self.tree.replaced(target.name)
        self.tree.close_shortcuts(target.name)
        self._used(*weight.sources, *_sources_of_bias(target))

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        place = locate(self.module, module, parameter.name.rpartition(".")[2])
        original = self._parameters.get(parameter.sources[0])
        if original is None or place.part is not None:
            self.dtype = torch_dtype(parameter.dtype)
            super().put_tensor(module, parameter, reader)
        else:
            value = reader.tensor(parameter.sources[0])
            if value.data_ptr() != original.data_ptr() or value.device != self.device:
                original.data = value.to(device=self.device, dtype=original.dtype)
            place.module._parameters[place.local] = original
        self._used(*parameter.sources)

    def restore(self) -> None:
        """Give back the weights that calibration had set aside when it failed."""
        for name, parameter in self._parameters.items():
            path, _, local = name.rpartition(".")
            owner = self.module.get_submodule(path)
            found = owner._parameters.get(local)
            if found is not None and found.is_meta:
                owner._parameters[local] = parameter

    def _used(self, *sources: str) -> None:
        for name in sources:
            self._wanted[name] -= 1
            if self._wanted[name] <= 0:
                self._parameters.pop(name, None)


def _sources_of_bias(target: Target) -> tuple[str, ...]:
    bias = target.module.parameters.get("bias")
    return () if bias is None else bias.sources


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy that shares all but the parameters, which are on the meta device."""
    made = copy.copy(module)
    made._parameters = {
        local: None
        if item is None
        else nn.Parameter(torch.empty_like(item, device="meta"), item.requires_grad)
        for local, item in module._parameters.items()
    }
    return made


def _is_linear(part: nn.Module) -> bool:
    """An ``nn.Linear`` that computes as one, and whose weight nobody else looks into."""
    return (
        isinstance(part, nn.Linear)
        and type(part).forward in (nn.Linear.forward, KeptLinear.forward)
        and not isinstance(part, NonDynamicallyQuantizableLinear)
        and "weight" in part._parameters
    )
