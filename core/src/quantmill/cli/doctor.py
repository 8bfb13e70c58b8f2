"""``quantmill doctor``."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import click

from quantmill.cli.exits import ENVIRONMENT
from quantmill.cli.options import JSON
from quantmill.cli.output import print_json, size, table
from quantmill.host import Status, default_host, missing_requirements


@click.command("doctor")
@click.option("--check", is_flag=True, help="Exit with 3 if anything is missing.")
@JSON
def command(check: bool, as_json: bool) -> None:
    """Say what this environment can do with each method, and what is missing."""
    from quantmill.kernels import KernelRegistry

    host = default_host()
    machine = _machine()
    methods: list[dict[str, Any]] = []
    for method in host.methods.values():
        unmet = [
            {
                "needs": f"{item.distribution}{item.versions}",
                "found": there,
                "why": item.why,
                "optional": item.optional,
                "fix": f'pip install "{item.distribution}{item.versions}"',
            }
            for item, there in missing_requirements(method.requirements)
        ]
        able = method.capabilities
        methods.append(
            {
                "name": method.name,
                "summary": method.summary,
                "short_names": [preset.name for preset in method.presets],
                "devices": [d for d in able.devices if d == "cpu" or d in machine["devices"]],
                "can": [
                    name
                    for name in (
                        "on_the_fly",
                        "calibrated",
                        "prequantized",
                        "serialisable",
                        "trainable",
                        "compileable",
                        "dequantizable",
                    )
                    if getattr(able, name)
                ],
                "missing": unmet,
            }
        )
    registry = KernelRegistry.of(host)
    kernels = [
        {
            "name": item.name,
            "operation": item.operation,
            "form": item.form,
            "device": item.device,
            "unavailable": registry.unavailable(item),
        }
        for item in registry.kernels
    ]
    plugins = [item.to_dict() for item in host.plugins.values()]
    if as_json:
        print_json({"machine": machine, "plugins": plugins, "methods": methods, "kernels": kernels})
    else:
        table("machine", ("what", "value"), list(machine.items()))
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
    bad = [p for p in plugins if p["status"] not in (Status.OK.value, Status.DISABLED.value)]
    missing = [u for m in methods for u in m["missing"]]
    if check and (bad or missing):
        sys.exit(ENVIRONMENT)


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": ["cpu"],
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
    if torch.cuda.is_available():
        found["devices"].append("cuda")
        for index in range(torch.cuda.device_count()):
            free_bytes, total = torch.cuda.mem_get_info(index)
            found[f"cuda:{index}"] = (
                f"{torch.cuda.get_device_name(index)}, compute capability "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(index)))}, "
                f"{size(free_bytes)} of {size(total)} free"
            )
    return found
