"""Builds the C library with the system's compiler while the package is built.

The library uses no Python headers, so one wheel serves every Python 3 of a platform.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Contracting a*b+c would change the last bit, and these bytes must equal the peer's.
FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Werror=implicit-function-declaration",
    "-fvisibility=hidden",
]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]


class NativeBuild(BuildHookInterface):  # type: ignore[type-arg]
    """Compile ``c/*.c`` into ``_native.so`` and tag the wheel for the platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before the files are collected, for wheels and editable installs alike."""
        package = Path(self.root) / "src" / "quantmill_cpu"
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        extra = SANITIZE if os.environ.get("QUANTMILL_CPU_SANITIZE") else []
        sources = sorted(str(path) for path in (package / "c").glob("*.c"))
        out = package / "_native.so"
        temporary = out.with_suffix(".so.new")
        subprocess.run(
            [compiler[0], *FLAGS, *extra, "-o", str(temporary), *sources, "-lm"], check=True
        )
        temporary.replace(out)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
