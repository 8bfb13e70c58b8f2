"""The suite for a backend that is only known by name."""

from __future__ import annotations

import re
from typing import Any

import torch

from quantmill.findings import QuantmillError
from quantmill.host import Host, Status, default_host
from quantmill.registrations import Method
from quantmill.stages.select import parse_method
from quantmill.testing.conformance import MethodConformance

__all__ = ["methods_of", "suite_for"]


def methods_of(name: str, host: Host | None = None) -> list[str]:
    """The METHODs that a plugin, a method or a METHOD stands for.

    Raises:
        ValueError: nothing installed is called so, or it can't be used.
    """
    host = host or default_host()
    info = host.plugins.get(name)
    if info is not None and info.status is not Status.OK:
        raise ValueError(f"plugin {name} is {info.status.value}: {info.reason}")
    owned = [item for owner, item in host.registered("methods") if owner == name]
    methods: list[Method] = owned or ([host.methods[name]] if name in host.methods else [])
    if methods:
        found = [preset.name for method in methods for preset in method.presets]
        return found or [method.name for method in methods]
    if info is not None:
        raise ValueError(f"plugin {name} has no method")
    try:
        parse_method(name, host)
    except QuantmillError as error:
        raise ValueError(str(error)) from None
    return [name]


def suite_for(method: str, host: Host | None = None) -> type[MethodConformance]:
    """A class of the suite for a METHOD: bounds for its bits, calibration data if it needs some."""
    host = host or default_host()
    request = parse_method(method, host)
    registered = host.methods[request.method or ""]
    preset = next((p for p in registered.presets if p.name == method.partition(":")[0]), None)
    able = registered.capabilities
    attributes: dict[str, Any] = {
        "method": method,
        "max_error": _bound(preset.bits if preset is not None else 0),
        "__doc__": f"{method} keeps the promises that every backend makes.",
        "__module__": "quantmill.testing.backend_suite",
    }
    if able.calibrated and not able.on_the_fly:
        tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
        attributes |= {"options": {"calibration": tokens}, "changes_float": True}
    words = re.findall(r"[A-Za-z0-9]+", method)
    return type(
        "Test" + "".join(word.capitalize() for word in words), (MethodConformance,), attributes
    )


def _bound(bits: float) -> float:
    """Most relative error of normal weights that a method of so many bits may have."""
    if bits >= 7:
        return 0.06
    if bits >= 3.5:
        return 0.2
    return 0.4 if bits >= 2.5 else 0.7 if bits >= 1.9 else 1.1
