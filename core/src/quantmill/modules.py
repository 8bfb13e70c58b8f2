"""Any ``nn.Module`` as a source: its tensors in memory in place of a checkpoint's files.

The stages do not notice: the module is described by the same headers and the same tree, and the
sink replaces linears in the module itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantmill.architecture import Architecture
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.experts import matrix_modules, stack_of
from quantmill.targeting.roles import guess_layer, guess_role
from quantmill.targeting.types import ModuleInfo, ParameterInfo

__all__ = ["MemoryReader", "MemorySource", "ModuleArchitecture", "headers_of"]


class MemorySource:
    """A source without files; tensors come from memory."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self.tensors = dict(tensors)

    def reader(self, headers: CheckpointHeaders) -> MemoryReader:
        """What reads its tensors."""
        return MemoryReader(headers, self.tensors)

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

    def __init__(self, headers: CheckpointHeaders, tensors: Mapping[str, Tensor]) -> None:
        self.headers = headers
        self._tensors = tensors

    def __enter__(self) -> MemoryReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""

    def tensor(self, name: str) -> Tensor:
        """The tensor itself, on its device."""
        return self._tensors[name]

    def mapped(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]

    def read_into(self, header: TensorHeader, out: Tensor, start_elem: int = 0) -> None:
        """Copy elements into ``out``."""
        flat = self._tensors[header.name].reshape(-1)
        out.copy_(flat[start_elem : start_elem + out.numel()].reshape(out.shape))

    def row_blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """``(first row, rows)``."""
        whole = self._tensors[name]
        for start in range(0, whole.shape[0], max(1, rows)):
            yield start, whole[start : start + rows]


def headers_of(module: nn.Module) -> CheckpointHeaders:
    """Headers of a module's parameters, detached; tied ones appear under their first name."""
    tensors: dict[str, Tensor] = {}
    headers: dict[str, TensorHeader] = {}
    for name, parameter in module.named_parameters():
        data = parameter.detach()
        tensors[name] = data
        size = data.numel() * data.element_size()
        headers[name] = TensorHeader(name, code_of(data.dtype), tuple(data.shape), "", 0, size)
    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    known = {} if vocabulary is None else {"vocab_size": vocabulary}
    return CheckpointHeaders(
        headers, {}, {}, known, None, MemorySource(type(module).__name__, tensors)
    )


class ModuleArchitecture(Architecture):
    """The tree of a live module. Building gives that module: it is changed in place."""

    source_name = "module"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        first: dict[int, str] = {}
        self._tied: dict[str, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            owner = first.setdefault(id(parameter), name)
            if owner != name:
                self._tied[name] = owner
        self._modules = [info for pair in module.named_modules() for info in self._infos(*pair)]

    def _infos(self, name: str, part: nn.Module) -> Iterator[ModuleInfo]:
        """The module itself, and for experts in stacks each of their matrices."""
        stack = stack_of(part)
        if stack is not None:
            for info in matrix_modules(name, stack):
                own = {local: self._matrix(item) for local, item in info.parameters.items()}
                yield replace(info, parameters=own)
        stacked = () if stack is None else stack.parameters
        if any(p is not None and key not in stacked for key, p in part._parameters.items()):
            yield self._info(name, part, stacked)

    def _matrix(self, info: ParameterInfo) -> ParameterInfo:
        assert info.part is not None
        name = f"{info.part.module}.{info.part.parameter}".removeprefix(".")
        return replace(
            info,
            dtype=code_of(self.module.get_parameter(name).dtype),
            sources=(self._tied.get(name, name),),
        )

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
        if type(part) is nn.Linear:
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
