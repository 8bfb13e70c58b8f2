"""Weights that live elsewhere than where they compute: on the CPU beside a GPU, or on the disk.

Float parameters are accelerate's business: its hooks bring them and drop them. A quantized linear
is brought by its own module here, from the tensors of its method's disk layout, so that any
backend's weights can be offloaded without knowing of it: they are decoded, the method's linear is
made, computes, and is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantmill.checkpoint.reader import TensorReader
from quantmill.embedding import FormWeight
from quantmill.experts import locate
from quantmill.forms import Form
from quantmill.job import Job, Selection
from quantmill.stages.origin import Origin
from quantmill.stages.quantize import codec_of, factory_of, member_headers, open_reader
from quantmill.stages.replace import ModelSink
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Part, Target
from quantmill_transformers.architecture import TransformersArchitecture
from quantmill_transformers.placement import Placement, lies_in_file

__all__ = ["OffloadedLinear", "PlacedSink"]

Store = Callable[[], Mapping[str, Tensor]]
"""Gives the tensors of one module in its method's layout."""


class OffloadedLinear(nn.Module):
    """A linear of any method whose weight is read when it computes.

    Its ``state_dict`` is the method's layout, as that of the linear it stands for.
    """

    def __init__(
        self, job: Job, selection: Selection, target: Target, store: Store, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = target.in_features, target.out_features
        self._job, self._selection, self._target = job, selection, target
        self._store, self.bias = store, bias

    @property
    def form(self) -> Form:
        """The weight, on the device where it computes."""
        assert self._job.plan is not None
        return self._form(torch.device(self._job.device))

    def _form(self, device: torch.device) -> Form:
        assert self._job.plan is not None
        tensors = {name: tensor.to(device) for name, tensor in self._store().items()}
        dtype = getattr(torch, self._job.plan.dtype)
        return codec_of(self._job, self._selection).decode(tensors, self._target, dtype)

    @property
    def weight(self) -> Tensor:
        """The float weight ``[out, in]``, read and made where a value of it is used."""
        assert self._job.plan is not None
        device, dtype = torch.device(self._job.device), getattr(torch, self._job.plan.dtype)
        return FormWeight.of(
            lambda: self.form, (self.out_features, self.in_features), device, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        assert self._job.plan is not None
        bias = None if self.bias is None else self.bias.to(x.device)
        dtype = getattr(torch, self._job.plan.dtype)
        factory = factory_of(self._job, self._selection)
        module = factory.build(self._target, self._form(x.device), bias, dtype)
        result: Tensor = module.train(self.training)(x)
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._store().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, method={self._selection.label}"


class _InMemory:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}

    def __call__(self) -> Mapping[str, Tensor]:
        return self._tensors


class _InCheckpoint:
    """Mapped from where the checkpoint has it; the mapping goes when the tensors do."""

    def __init__(self, job: Job, target: Target, selection: Selection) -> None:
        assert job.architecture is not None
        prefix = job.architecture.module_prefix(target.module)
        self._headers = job.headers
        self._members = member_headers(prefix, codec_of(job, selection), job.headers)

    def __call__(self) -> Mapping[str, Tensor]:
        with open_reader(self._headers) as reader:
            return {name: reader.mapped(item.name) for name, item in self._members.items()}


class _InFile:
    """A file of its own in the offload folder."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path = path
        save_file({n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}, path)

    def __call__(self) -> Mapping[str, Tensor]:
        with safe_open(self._path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


class PlacedSink(ModelSink):
    """Fills a model whose modules go to several places."""

    architecture: TransformersArchitecture

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        architecture: Any,
        placement: Placement,
        folder: str | None,
    ) -> None:
        super().__init__(job, model, architecture)
        self.placement = placement
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._missing: dict[str, int] = {}
        """Parts that a stack of experts on the disk still lacks."""
        self.index: dict[str, dict[str, Any]] = {}
        """accelerate's: where each float parameter on the disk lies."""

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        place = self.placement.of(target.name)
        if self.placement.offloaded(target.name):
            store = self._store(selection, target, form, place)
            kept = None if bias is None else bias.to(device="cpu", dtype=self.dtype)
            new = OffloadedLinear(self.job, selection, target, store, kept)
            Origin(self.job, selection, target).mark(new)
            self.model.set_submodule(target.name, new.eval())
            return
        if place != self.job.device:
            form = form.map_tensors(lambda tensor: tensor.to(place))
            bias = None if bias is None else bias.to(place)
        super().put_form(selection, target, form, bias)

    def _store(self, selection: Selection, target: Target, form: Form, place: str) -> Store:
        if place == "disk" and self.job.prequantized:
            return _InCheckpoint(self.job, target, selection)
        tensors = codec_of(self.job, selection).encode(form)
        if place == "cpu":
            return _InMemory(tensors)
        assert self.folder is not None, "the placement was checked"
        return _InFile(self.folder / f"{target.name}.safetensors", tensors)

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        place = self.placement.of(parameter.name)
        local = parameter.name.rpartition(".")[2]
        spot = locate(self.model, module, local)
        if spot.part is not None:
            self._put_part(module, parameter, reader, spot.part)
            return
        if place == "disk" and local in spot.module._parameters:
            self._leave_on_disk(parameter, reader)
            self.architecture.elsewhere.add(parameter.name)
            return
        self.device = torch.device("cpu" if place in ("cpu", "disk") else place)
        super().put_tensor(module, parameter, reader)

    def _put_part(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader, part: Part
    ) -> None:
        """A part of a stack of experts; the stack goes to the disk when it is whole."""
        name = f"{part.module}.{part.parameter}"
        place = self.placement.of(name)
        self.device = torch.device("cpu" if place in ("cpu", "disk") else place)
        super().put_tensor(module, parameter, reader)
        if place != "disk":
            return
        if name not in self._missing:
            every = (part for item in self.architecture.modules for part in item.parts.values())
            self._missing[name] = sum(f"{p.module}.{p.parameter}" == name for p in every)
        self._missing[name] -= 1
        if self._missing[name]:
            return
        from accelerate.utils import offload_weight

        assert self.folder is not None, "the placement was checked"
        store = self.model.get_submodule(part.module)._parameters
        whole = store[part.parameter]
        assert whole is not None
        offload_weight(whole.data, name, str(self.folder), self.index)
        store[part.parameter] = nn.Parameter(whole.to("meta"), requires_grad=False)
        self.architecture.elsewhere.add(name)

    def _leave_on_disk(self, parameter: ParameterInfo, reader: TensorReader) -> None:
        from accelerate.utils import offload_weight

        name = parameter.name
        dtype = self.architecture.policy.of(name, self.architecture.shapes[name])
        headers = self.job.headers
        header = headers.tensors[parameter.sources[0]]
        if lies_in_file(self.architecture, parameter):
            self.index[name] = {
                "safetensors_file": str(headers.source.local_path(header.file)),
                "weight_name": header.name,
                "dtype": str(dtype).removeprefix("torch."),
            }
            return
        assert self.folder is not None, "the placement was checked"
        tensor = self.architecture.assemble(parameter, reader).to(dtype)
        offload_weight(tensor, name, str(self.folder), self.index)

    def dispatch(self, *, buffers: bool) -> None:
        """Attach accelerate's hooks, which bring inputs and float parameters where they compute.

        ``buffers`` lets it offload persistent buffers as well.
        """
        from accelerate import dispatch_model

        model: Any = self.model
        for name, owner in self.architecture.tied.items():
            if owner in self.index:
                self.index[name] = self.index[owner]
        resident = {
            name: tensor
            for name, tensor in model.named_parameters(remove_duplicate=False)
            if self.placement.of(name) == "cpu" and self.placement.offloaded(name)
        }
        on_disk = "disk" in self.placement.devices.values()
        dispatch_model(
            model,
            dict(self.placement.devices),
            main_device=self.placement.main,
            state_dict=resident or None,
            offload_dir=None if self.folder is None else str(self.folder),
            offload_index=self.index if on_disk else None,
            offload_buffers=buffers,
            skip_keys=model._skip_keys_device_placement,
        )
