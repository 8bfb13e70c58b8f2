"""Stage 5, replacement: the sink that makes a live model out of forms and tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantmill.checkpoint.reader import TensorReader, torch_dtype
from quantmill.embedding import embedding_of
from quantmill.experts import Place, locate, unstack_planned
from quantmill.findings import QuantmillError, declare
from quantmill.forms import Form
from quantmill.job import Job, Selection
from quantmill.linear import FormLinear
from quantmill.stages.attach import attach_form
from quantmill.stages.origin import Origin
from quantmill.stages.quantize import codec_of, factory_of
from quantmill.stages.weights import on_device
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target

if TYPE_CHECKING:
    from quantmill.architecture import Architecture

__all__ = ["ModelSink", "embedding_for", "linear_for"]

CANT_SHARE = declare("QM-REPLACE-001", "A module can't share a quantized weight")


def linear_for(
    job: Job, selection: Selection, target: Target, form: Form, bias: Tensor | None
) -> nn.Module | None:
    """The module of the method's linear factory for a form; None when it has none for the kind."""
    assert job.plan is not None
    factory = factory_of(job, selection)
    if not factory.covers(target):
        return None
    return factory.build(target, form, bias, getattr(torch, job.plan.dtype))


def embedding_for(
    job: Job, selection: Selection, module: nn.Module, form: Form, *, stored: bool = True
) -> nn.Module | None:
    """The core's embedding with a form in the place of ``module``; None when it is none."""
    assert job.plan is not None
    if not isinstance(module, nn.Embedding):
        return None
    dtype = getattr(torch, job.plan.dtype)
    return embedding_of(module, form, codec_of(job, selection), dtype, stored=stored)


_MAPPED = 1 << 20
"""Bytes from which a tensor is worth a mapping of its own."""


class ModelSink:
    """Fills a model that was built on the meta device."""

    def __init__(self, job: Job, model: nn.Module, architecture: Architecture) -> None:
        assert job.plan is not None
        self.job = job
        self.model = model
        self.architecture = architecture
        self.dtype: torch.dtype = getattr(torch, job.plan.dtype)
        self.device = torch.device(job.device)
        self._shared: dict[str, tuple[Selection, Form]] = {}
        self._whole: set[str] = set()
        """Stacks that were put at once."""
        if not job.options.dequantize:
            quantized = {
                entry.target.name
                for entry in job.plan.modules
                if entry.action == "quantize" and entry.target is not None
            }
            unstack_planned(model, architecture.modules, quantized)

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        """Put the method's module in the target's place; float again when dequantizing."""
        bias = None if bias is None else bias.to(self.dtype)
        if self.job.options.dequantize:
            weight = form.dequantize(self.dtype)
            if target.transposed:
                weight = weight.transpose(-1, -2).contiguous()
            _put(locate(self.model, target.module, target.parameter), weight)
            if bias is not None:
                _put(locate(self.model, target.module, "bias"), bias)
            return
        module = self.model.get_submodule(target.name)
        new: Any = self.job.host.hook.quantmill_replace(
            job=self.job, selection=selection, target=target, module=module, form=form, bias=bias
        )
        if new is None:
            # No linear class covers it: the float parameter is made of the form when it is used.
            attach_form(
                module,
                target.parameter,
                form,
                self.dtype,
                codec=codec_of(self.job, selection),
                transposed=target.transposed,
            )
            if bias is not None:
                _put(Place(module, "bias"), bias)
            return
        new.train(module.training)
        Origin(self.job, selection, target).mark(new)
        self.model.set_submodule(target.name, new)
        if target.weight_name in self.architecture.tied.values():
            self._shared[target.weight_name] = selection, form

    def tie(self) -> None:
        """Let modules that share the weight of a quantized one compute with its form."""
        for name, owner in self.architecture.tied.items():
            if owner not in self._shared:
                continue
            selection, form = self._shared[owner]
            path = name.rpartition(".")[0]
            module = self.model.get_submodule(path)
            new: Any = None
            if isinstance(module, nn.Embedding):
                new = embedding_for(self.job, selection, module, form, stored=False)
            elif type(module) is nn.Linear:
                new = FormLinear(
                    form,
                    module.bias,
                    codec_of(self.job, selection),
                    self.job.kernels,
                    self.job.compute_dtype,
                    stored=False,
                )
            else:
                raise QuantmillError(
                    CANT_SHARE(
                        path,
                        f"it is a {type(module).__name__} and shares its weight with {owner},"
                        " which is quantized",
                        "load the model with dequantize=True",
                    )
                )
            new.train(module.training)
            self.model.set_submodule(path, new)

    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        """Read a float tensor straight into its parameter, in the dtype it will have.

        Large ones that stay as they lie on the disk are mapped: no copy, no memory before they
        are used, and the file is not written to.
        """
        place = locate(self.model, module, parameter.name.rpartition(".")[2])
        if place.part is not None and parameter.part is not None:
            # The model and the file both hold the whole stack: it is taken at once.
            if parameter.sources[0] in self._whole:
                return
            self._whole.add(parameter.sources[0])
            place = Place(place.module, place.local)
            parameter = replace(parameter, part=None)
        stored = torch_dtype(parameter.dtype)
        wanted = stored
        if stored.is_floating_point and stored.itemsize > 1:
            wanted = torch.float32 if module.keep_float else self.dtype
        if self.architecture.converted(parameter):
            tensor = self.architecture.assemble(parameter, reader)
        elif (
            self.device.type == "cpu"
            and wanted == stored
            and reader.headers.tensors[parameter.sources[0]].nbytes >= _MAPPED
        ):
            tensor = reader.mapped(parameter.sources[0])
        else:
            tensor = on_device(reader, parameter.sources[0], self.device)
        _put(place, tensor.to(device=self.device, dtype=wanted))


def _put(place: Place, tensor: Tensor) -> None:
    store = place.module._parameters
    if place.part is not None:
        stack = store[place.local]
        assert stack is not None
        if stack.is_meta:
            value = torch.empty(stack.shape, dtype=tensor.dtype, device=tensor.device)
            store[place.local] = stack = nn.Parameter(value, tensor.is_floating_point())
        place.part.of(stack.data).copy_(tensor)
    elif place.local in store:
        store[place.local] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        place.module._buffers[place.local] = tensor
