"""Bytes of every module: what a decision makes of it on the disk, in memory, while computing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantmill.backend import Codec, Quantizer
from quantmill.checkpoint.dtypes import torch_dtype
from quantmill.findings import QuantmillError, Severity, declare
from quantmill.job import Job, Selection
from quantmill.planning import ModulePlan
from quantmill.registrations import resolve
from quantmill.stages.quantize import codec_of, factory_of, member_headers, quantizer_of
from quantmill.targeting.types import (
    FLOAT_DTYPES,
    Decision,
    ModuleInfo,
    ParameterInfo,
    Target,
    targets_of,
)

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import TensorHeader
    from quantmill.forms import Form

__all__ = ["ModulePlanner", "as_float", "describe_form", "encoded_bytes"]

TENSORS_OUTRANK = declare(
    "QM-TARGET-101",
    "The tensors present contradict the config; the tensors are followed",
    Severity.WARNING,
)
KIND_NOT_COVERED = declare(
    "QM-TARGET-102", "The method does not take this kind of module", Severity.WARNING, fallback=True
)
STORED_SKIPPED = declare(
    "QM-TARGET-103", "A module that the user keeps float is quantized in the checkpoint"
)
STORED_ALONE = declare("QM-TARGET-104", "A quantized weight lacks its scales")
NO_SHAPE = declare("QM-TARGET-106", "The shape of a quantized module is not known")


def as_float(module: ModuleInfo) -> ModuleInfo:
    """A stored quantized weight is as much a target as the float one it stands for."""
    weight = module.parameters.get("weight")
    if weight is None or weight.dtype in FLOAT_DTYPES:
        return module
    parameters = {**module.parameters, "weight": replace(weight, dtype="BF16")}
    return replace(module, parameters=parameters)


class _Measure(NamedTuple):
    """Of a form: its words, and bytes on the disk, in memory, while made, while computing forward
    and backward, for each row of activations then, while its linear is built, while it is
    encoded."""

    form: str
    stored: int
    resident: int
    working: int
    forward: int
    backward: int
    row: int
    building: int
    encoding: int


class ModulePlanner:
    """Entries of a plan: for each module and decision the form it gets, and bytes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.main: Selection | None = next(iter(job.selections.values()), None)
        architecture = job.architecture
        assert architecture is not None
        self.architecture = architecture
        self.dtype_name = job.compute_dtype
        self.dtype: torch.dtype = getattr(torch, self.dtype_name)
        self.target_cast = job.dtype is not None
        # Layers repeat: the same shape with the same method has the same form and bytes.
        self._cache: dict[Any, _Measure] = {}

    def module(self, module: ModuleInfo, decision: Decision) -> Iterator[ModulePlan]:
        """One plan entry, or one per parameter of a stacked module."""
        if self.job.prequantized:
            stored = self._stored(module, decision)
            if stored is not None:
                yield stored
                return
            if decision.action == "quantize":
                decision = Decision(
                    module.name, "keep", None, "the checkpoint holds it as float", "checkpoint"
                )
        if decision.action != "quantize":
            yield self._kept(module, decision)
            return
        assert self.main is not None
        selection = self.job.selections.get(decision.method or self.main.label, self.main)
        quantizer = quantizer_of(self.job, selection)
        covered = selection.method.capabilities.target_kinds
        targets = [item for item in targets_of(module) if item.kind in covered]
        if not targets:
            why = f"{selection.label} does not take modules of kind {module.kind}"
            self.job.findings.add(
                KIND_NOT_COVERED(module.name, why, "assign another method, or leave it out")
            )
            yield self._kept(module, Decision(module.name, "keep", None, why, "method"))
            return
        others = [
            parameter
            for local, parameter in module.parameters.items()
            if local not in {item.parameter for item in targets}
        ]
        rest = sum(_bytes(parameter) for parameter in others)
        rest_after = sum(self._written(module, item)[1] for item in others if item.sources)
        for index, target in enumerate(targets):
            self.job.findings.extend(quantizer.check(target))
            measure = self._measure(selection, quantizer, target)
            extra = rest if index == 0 else 0
            before = _bytes(module.parameters[target.parameter])
            yield ModulePlan(
                name=module.name if len(targets) == 1 else target.weight_name,
                kind=target.kind,
                shape=tuple(module.parameters[target.parameter].shape),
                action="quantize",
                method=selection.label,
                form=measure.form,
                reason=decision.reason,
                origin=decision.origin,
                parameters=target.weights,
                bytes_before=before + extra,
                bytes_after=measure.stored + (rest_after if index == 0 else 0),
                bytes_memory=measure.resident + extra,
                working_bytes=measure.working,
                forward_bytes=measure.forward,
                backward_bytes=measure.backward,
                row_bytes=measure.row,
                building_bytes=measure.building,
                encoding_bytes=measure.encoding,
                target=target,
            )

    def _measure(self, selection: Selection, quantizer: Quantizer[Any], target: Any) -> _Measure:
        dtype = self._source_dtype(target)
        key = (
            selection.label,
            target.kind,
            target.out_features,
            target.in_features,
            target.experts,
            target.transposed,
            dtype,
        )
        if key not in self._cache:
            form = quantizer.abstract(target, dtype)
            factory = factory_of(self.job, selection)
            self._cache[key] = _Measure(
                describe_form(form),
                encoded_bytes(codec_of(self.job, selection), form),
                factory.resident_bytes(form),
                quantizer.working_bytes(target, dtype),
                factory.forward_bytes(form, self.dtype),
                factory.backward_bytes(form, self.dtype),
                factory.row_bytes(form, self.dtype),
                factory.building_bytes(form),
                codec_of(self.job, selection).encoding_bytes(form),
            )
        return self._cache[key]

    def _source_dtype(self, target: Any) -> Any:
        if self.target_cast:
            return self.dtype
        return torch_dtype(target.module.parameters[target.parameter].dtype)

    def _stored(self, module: ModuleInfo, decision: Decision) -> ModulePlan | None:
        """The entry of a module that the checkpoint holds quantized, or None."""
        prefix = self.architecture.module_prefix(module)
        selection = self.main  # what the checkpoint says, with the user's runtime fields
        if self.job.stored_targets is not None:
            label = self.job.stored_targets.get(prefix)
            selection = None if label is None else self.job.selections[label]
        if selection is None:
            return None
        codec: Codec[Any] = codec_of(self.job, selection)
        members = member_headers(prefix, codec, self.job.headers)
        if not members:
            return None
        target = _stored_target(module, self.job.headers.config)
        note = self.job.headers.metadata.get(f"{prefix}.{target.parameter}", "")
        target = replace(target, note=note)
        form = codec.describe(members, target, self.dtype)
        if form is None:
            self._alone(module, members, selection)
            return None
        tied = module.tied_to is not None  # No config says that it must stay float.
        if decision.action == "keep" and decision.origin in ("checkpoint", "default") and not tied:
            self.job.findings.add(
                TENSORS_OUTRANK(
                    module.name,
                    f"the config would keep it float ({decision.reason}),"
                    " but its tensors are quantized",
                    "nothing to do; correct the config to silence this",
                )
            )
        if decision.action == "keep" and decision.origin == "user":
            self.job.findings.add(
                STORED_SKIPPED(
                    module.name,
                    "you asked to keep it float, and the checkpoint holds it quantized",
                    "leave it out, or load the whole model with dequantize=True",
                )
            )
        stored = sum(item.nbytes for item in members.values())
        # What is read lies mapped beside what is made of it, before the module's own is there.
        decoding = stored + codec.decoding_bytes(form)
        names = {suffix.split(".")[0] for suffix in codec.suffixes}
        rest = sum(_bytes(p) for local, p in module.parameters.items() if local not in names)
        factory = factory_of(self.job, selection)
        resident, forward = factory.resident_bytes(form), factory.forward_bytes(form, self.dtype)
        backward = factory.backward_bytes(form, self.dtype)
        row, building = factory.row_bytes(form, self.dtype), factory.building_bytes(form)
        if self.job.options.dequantize:
            # The float weight is made of the form, in float32 first.
            resident = target.weights * self.dtype.itemsize
            building = form.nbytes + 2 * 4 * target.weights
            forward = backward = row = 0
        building = max(building, decoding - resident)
        return ModulePlan(
            name=module.name,
            kind=target.kind,
            shape=tuple(form.shape),
            action="quantize",
            method=selection.label,
            form=describe_form(form),
            reason="quantized in the checkpoint",
            origin="checkpoint",
            parameters=target.weights,
            bytes_before=stored + rest,
            bytes_after=stored + rest,
            bytes_memory=resident + rest,
            forward_bytes=forward,
            backward_bytes=backward,
            row_bytes=row,
            building_bytes=building,
            target=target,
        )

    def _alone(
        self, module: ModuleInfo, members: Mapping[str, TensorHeader], selection: Selection
    ) -> None:
        """Tensors of a quantized module without those that belong to them are no float module."""
        weight = module.parameters.get("weight")
        if weight is None or not targets_of(as_float(module)):
            return
        if weight.sources and weight.dtype in FLOAT_DTYPES:
            return
        there = ", ".join(f"{name} {item.dtype}" for name, item in members.items())
        self.job.findings.add(
            STORED_ALONE(
                module.name,
                f"it has {there}, and what belongs to that in the layout of {selection.label}"
                " is missing",
                "the checkpoint is damaged: get it again",
            )
        )

    def _kept(self, module: ModuleInfo, decision: Decision) -> ModulePlan:
        weight = module.parameters.get("weight")
        shape = weight.shape if weight is not None else ()
        tied = self.architecture.tied
        count = before = after = memory = 0
        form = weight.dtype if weight is not None else ""
        for parameter in module.parameters.values():
            if parameter.name in tied or not parameter.sources:
                continue
            elements = prod(parameter.shape)
            count += elements
            before += _bytes(parameter)
            stored, size = self._written(module, parameter)
            after += size
            if parameter is weight:
                form = stored
            memory += elements * self._live_itemsize(module, parameter)
        return ModulePlan(
            name=module.name,
            kind=module.kind,
            shape=tuple(shape),
            action=decision.action,
            method=None,
            form=form,
            reason=decision.reason,
            origin=decision.origin,
            parameters=count,
            bytes_before=before,
            bytes_after=after,
            bytes_memory=memory,
        )

    def _written(self, module: ModuleInfo, parameter: ParameterInfo) -> tuple[str, int]:
        """Dtype and bytes of a tensor that stays float, in what is written."""
        container = self.job.container
        if container is not None and container.write is not None:
            answer: tuple[str, int] | None = resolve(container.write).kept(
                self.job, module, parameter
            )
            if answer is not None:
                return answer
        return parameter.dtype, _bytes(parameter)

    def _live_itemsize(self, module: ModuleInfo, parameter: ParameterInfo) -> int:
        if parameter.dtype not in ("F32", "F16", "BF16", "F64"):
            return torch_dtype(parameter.dtype).itemsize
        return 4 if module.keep_float else self.dtype.itemsize


def _stored_target(module: ModuleInfo, config: Mapping[str, Any]) -> Target:
    found = targets_of(module)
    if found:
        return found[0]
    weight = module.parameters.get("weight")
    if weight is None:
        cause = "its weight is packed, and no installed framework knows this architecture"
        fix = 'pip install "quantmill[transformers]"'
        if "model_type" not in config and "architectures" not in config:
            cause = "its weight is packed, and there is no config.json to say what model this is"
            fix = "get the checkpoint's config.json"
        raise QuantmillError(NO_SHAPE(module.name, cause, fix))
    rows, columns = weight.shape[0], weight.shape[-1]
    transposed = module.kind == "conv1d"
    if transposed:
        rows, columns = columns, rows
    return Target(module, "weight", module.kind, rows, columns, None, transposed)


def describe_form(form: Form) -> str:
    """A form in words, for tables: ``codebook nf4 4-bit, flat 64, nested``."""
    traits = form.traits()
    parts = [form.kind]
    if traits.get("table"):
        parts.append(str(traits["table"]))
    if traits.get("bits"):
        parts.append(f"{traits['bits']}-bit")
    text = " ".join(parts) + f", {traits.get('grouping')}"
    if traits.get("group_size"):
        text += f" {traits['group_size']}"
    return text + (", nested" if traits.get("nested") else "")


def encoded_bytes(codec: Codec[Any], form: Form) -> int:
    """Bytes of a form's tensors on disk; it may be on the meta device."""
    return sum(t.numel() * t.element_size() for t in codec.encode(form).values())


def _bytes(parameter: ParameterInfo) -> int:
    if not parameter.sources:
        return 0
    return prod(parameter.shape) * torch_dtype(parameter.dtype).itemsize
