"""``quantmill doctor``."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import click

from quantmill.cli.exits import ENVIRONMENT, OK
from quantmill.cli.kernels import describe_kernels, devices_here
from quantmill.cli.options import JSON
from quantmill.cli.output import print_json, show_findings, size, table
from quantmill.host import Status, default_host
from quantmill.requirements import missing_requirements

if TYPE_CHECKING:
    from quantmill.registrations import Method

_ABILITIES = (
    "on_the_fly",
    "calibrated",
    "prequantized",
    "serialisable",
    "trainable",
    "compileable",
    "dequantizable",
)


@click.command("doctor")
@click.option("--check", is_flag=True, help="Exit with 3 if anything is missing.")
@JSON
def command(check: bool, as_json: bool) -> int:
    """Say what this environment can do with each method, and what is missing."""
    host = default_host()
    machine = _machine()
    methods = [_method(item, machine["devices"]) for item in host.methods.values()]
    kernels, findings = describe_kernels(host)
    plugins = [item.to_dict() for item in host.plugins.values()]
    if as_json:
        print_json(
            {
                "machine": machine,
                "plugins": plugins,
                "methods": methods,
                "kernels": kernels,
                "findings": [item.to_dict() for item in findings],
            }
        )
    else:
        _show(machine, plugins, methods, kernels)
        show_findings(findings)
    bad = [p for p in plugins if p["status"] not in (Status.OK.value, Status.DISABLED.value)]
    missing = [unmet for method in methods for unmet in method["missing"]]
    return ENVIRONMENT if check and (bad or missing or findings) else OK


def _method(method: Method, devices: list[str]) -> dict[str, Any]:
    able = method.capabilities
    return {
        "name": method.name,
        "summary": method.summary,
        "short_names": [preset.name for preset in method.presets],
        "devices": [name for name in able.devices if name in devices],
        "can": [name for name in _ABILITIES if getattr(able, name)],
        "missing": [
            {
                "needs": f"{item.distribution}{item.versions}",
                "found": there,
                "why": item.why,
                "optional": item.optional,
                "fix": f'pip install "{item.distribution}{item.versions}"',
            }
            for item, there in missing_requirements(method.requirements)
        ],
    }


def _show(
    machine: dict[str, Any],
    plugins: list[dict[str, Any]],
    methods: list[dict[str, Any]],
    kernels: list[dict[str, Any]],
) -> None:
    rows = [(k, ", ".join(v) if isinstance(v, list) else v) for k, v in machine.items()]
    table("machine", ("what", "value"), rows)
    table(
        "plugins",
        ("name", "status", "reason", "fix"),
        [(p["name"], p["status"], p["reason"], p["fix"]) for p in plugins],
    )
    table(
        "methods",
        ("method", "short names", "devices here", "can", "missing"),
        [
            (
                m["name"],
                ", ".join(m["short_names"]),
                ", ".join(m["devices"]),
                ", ".join(m["can"]),
                "; ".join(f"{u['needs']}: {u['found']} ({u['fix']})" for u in m["missing"]),
            )
            for m in methods
        ],
    )
    table(
        "kernels",
        ("kernel", "operation", "form", "device", "here"),
        [
            (k["name"], k["operation"], k["form"], k["device"], k["unavailable"] or "yes")
            for k in kernels
        ],
    )


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": devices_here(),
    }
    try:
        import torch
    except ImportError as error:
        found["torch"] = f"can't be imported: {error}"
        return found
    from quantmill.stages.validate import available_memory

    found["torch"] = torch.__version__
    found["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    free = available_memory("cpu")
    found["free memory"] = size(free) if free is not None else "unknown"
    if "cuda" in found["devices"]:
        for index in range(torch.cuda.device_count()):
            found[f"cuda:{index}"] = _gpu(index)
    return found


def _gpu(index: int) -> str:
    import torch

    name = torch.cuda.get_device_name(index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    words = f"{name}, compute capability {capability}"
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # a device that another process has for itself
        return f"{words}, {error}"
    return f"{words}, {size(free)} of {size(total)} free"
