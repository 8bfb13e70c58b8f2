"""``device_map``: where each module is to live, from what a user wrote and what the plan weighs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.integrations.accelerate import _get_device_map, check_and_set_device_map

from quantmill.devices import cuda_there
from quantmill.findings import Finding, FindingsError, QuantmillError, declare
from quantmill.job import Job
from quantmill.targeting.types import ParameterInfo
from quantmill_transformers.architecture import TransformersArchitecture
from quantmill_transformers.quantizer import JobQuantizer

__all__ = ["Placement", "first_device", "lies_in_file", "normalise", "place"]

BAD_MAP = declare("QM-TF-020", "The device_map does not fit the model or the machine")
SPLIT_TIE = declare("QM-TF-021", "The device_map puts tied weights on different devices")
CANT_OFFLOAD = declare("QM-TF-022", "The method's weights can't be offloaded")
NO_FOLDER = declare("QM-TF-023", "Offloading to disk needs offload_folder")

_COMPUTED: Final = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices by module path, ``cpu`` and ``disk`` among them; the most specific path holds."""

    devices: Mapping[str, str]
    main: str
    """Where what is offloaded computes: the first real device, else the CPU."""

    def of(self, name: str) -> str:
        """The device of a module or parameter."""
        path = name
        while path not in self.devices:
            if not path:
                return self.main
            path = path.rpartition(".")[0]
        return self.devices[path]

    def offloaded(self, name: str) -> bool:
        """Whether it lives elsewhere than where it computes."""
        device = self.of(name)
        return device == "disk" or (device == "cpu" and self.main != "cpu")

    @property
    def dispatched(self) -> bool:
        """Whether there is more than one place."""
        places = set(self.devices.values())
        return len(places) > 1 or "disk" in places


def normalise(device_map: Any) -> str | dict[str, str]:
    """One of ``auto`` and the like, or devices by path as strings.

    Raises:
        QuantmillError: it is none.
    """
    try:
        found = check_and_set_device_map(device_map)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise QuantmillError(BAD_MAP("device_map", text, "write a device or a mapping")) from None
    if found is None:
        return {"": "cpu"}
    if isinstance(found, str):
        return found
    if not isinstance(found, Mapping) or not found:
        raise QuantmillError(BAD_MAP("device_map", f"{found!r} is no mapping", "write a mapping"))
    return {str(path): _device(value) for path, value in found.items()}


def _device(value: Any) -> str:
    if isinstance(value, int):
        return f"cuda:{value}"
    return "cuda:0" if str(value) == "cuda" else str(value)


def first_device(device_map: str | Mapping[str, str]) -> str:
    """The device that a job for ``device_map`` computes on."""
    if isinstance(device_map, str):
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    real = (item for item in device_map.values() if item != "disk" and not _problem(item))
    return next((item for item in real if item != "cpu"), "cpu")


def _problem(device: str) -> str:
    """Why a weight can't be put on ``device``, if so."""
    kind, _, index = device.partition(":")
    if kind in ("cpu", "disk"):
        return ""
    if kind != "cuda" or not (index or "0").isdecimal():
        return f"{device!r} is no device"
    if not cuda_there(f"cuda:{int(index or 0)}"):
        return f"torch sees no {device} here"
    return ""


def place(
    job: Job, device_map: str | dict[str, str], max_memory: Any, offload_folder: str | None
) -> Placement:
    """Where everything goes, for a job whose plan is made.

    Raises:
        FindingsError: everything that is wrong with the map, at once.
    """
    architecture = job.architecture
    assert isinstance(architecture, TransformersArchitecture)
    skeleton = architecture.skeleton
    if isinstance(device_map, str):
        sizes = JobQuantizer(job) if job.selections else None
        found = _get_device_map(skeleton, device_map, max_memory, sizes)
        device_map = {str(path): _device(value) for path, value in found.items()}
    placement = Placement(device_map, first_device(device_map))
    problems = [
        *_misfits(architecture, placement),
        *_splits(architecture, placement),
        *_unable(job, placement, offload_folder),
    ]
    if problems:
        raise FindingsError(problems)
    return Placement(dict(_disjoint(skeleton, "", placement)), placement.main)


def _disjoint(module: nn.Module, path: str, placement: Placement) -> Iterator[tuple[str, str]]:
    """The same map without a path below another: accelerate would place those below twice."""
    prefix = f"{path}." if path else ""
    if not any(other.startswith(prefix) and other != path for other in placement.devices):
        yield path, placement.of(path)
        return
    stores: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers)
    for store in stores:
        for local, tensor in store.items():
            if tensor is not None:
                yield prefix + local, placement.of(prefix + local)
    for local, child in module.named_children():
        yield from _disjoint(child, prefix + local, placement)


def _misfits(architecture: TransformersArchitecture, placement: Placement) -> Iterator[Finding]:
    names = {name for name, _ in architecture.skeleton.named_modules()} | set(architecture.shapes)
    for path, device in placement.devices.items():
        if path and path not in names:
            yield BAD_MAP(path, "the model has no such module", "see the names in the plan")
        problem = _problem(device)
        if problem:
            yield BAD_MAP(path, problem, "write cpu, disk, or the number of a GPU that there is")
    if "" in placement.devices:
        return
    lost = [
        name
        for name in architecture.shapes
        if not any(name == path or name.startswith(f"{path}.") for path in placement.devices)
    ]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        yield BAD_MAP(
            lost[0] + more, "the device_map has no device for it", "add it, or '' for the rest"
        )


def _splits(architecture: TransformersArchitecture, placement: Placement) -> Iterator[Finding]:
    for name, owner in architecture.tied.items():
        one, two = placement.of(name), placement.of(owner)
        if one != two:
            yield SPLIT_TIE(
                name,
                f"it is {owner}, the same weight: one is mapped to {one}, the other to {two}",
                "map both to one device",
            )


def lies_in_file(architecture: TransformersArchitecture, parameter: ParameterInfo) -> bool:
    """Whether a safetensors file has a float parameter as it is, but for its dtype."""
    if architecture.converted(parameter):
        return False
    file = architecture.headers.tensors[parameter.sources[0]].file
    return file.endswith(".safetensors")


def _unable(job: Job, placement: Placement, folder: str | None) -> Iterator[Finding]:
    """Offloaded weights of methods that can't be written down and read back, or with no place."""
    architecture = job.architecture
    assert job.plan is not None and isinstance(architecture, TransformersArchitecture)
    kinds: set[tuple[str, str]] = set()
    made = {
        entry.target.name
        for entry in job.plan.modules
        if entry.action == "quantize" and entry.target is not None
    }
    homeless = [
        parameter.name
        for module in architecture.modules
        for parameter in module.parameters.values()
        if placement.of(parameter.name) == "disk"
        and (parameter.sources or parameter.name in architecture.fresh)
        and (
            not (parameter.sources and lies_in_file(architecture, parameter))
            # Experts that stay float are a stack in the model, whatever they are in the file.
            or (module.parts and module.name not in made)
        )
    ]
    if folder is not None:
        homeless = [name for name in homeless if name in architecture.fresh]
    for entry in job.plan.modules:
        path = entry.name
        if entry.action != "quantize" or entry.target is None or entry.method is None:
            continue
        path = entry.target.name
        if not placement.offloaded(path):
            continue
        if placement.of(path) == "disk" and not job.prequantized and folder is None:
            homeless.append(path)
        if (entry.method, entry.kind) in kinds:
            continue
        kinds.add((entry.method, entry.kind))
        if job.options.dequantize:
            yield CANT_OFFLOAD(
                path, "it becomes float while loading", "load it whole, or leave it quantized"
            )
            continue
        selection = job.selections[entry.method]
        able = selection.method.capabilities
        if not able.prequantized or not (able.serialisable or job.prequantized):
            why = f"{selection.method.name} declares that its weights can't be stored and read back"
        elif not _covers(job, entry):
            why = f"{selection.label} has no linear for a module of kind {entry.kind}"
        else:
            continue
        yield CANT_OFFLOAD(path, why, f"map it to {placement.main}, or take another method")
    if homeless:
        more = f" and {len(homeless) - 1} more" if len(homeless) > 1 else ""
        yield NO_FOLDER(
            homeless[0] + more,
            "it lies in no file as the model wants it: it is quantized, converted or made anew",
            f"give offload_folder, or map it to {placement.main}",
        )


def _covers(job: Job, entry: Any) -> bool:
    from quantmill.stages.quantize import factory_of

    return bool(factory_of(job, job.selections[entry.method]).covers(entry.target))
