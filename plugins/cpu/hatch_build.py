"""Builds the C library with the system's compiler while the package is built.

The library uses no Python headers, so one wheel serves every Python 3 of a platform.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Contracting a*b+c would change the last bit, and these bytes must equal the peer's.
FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors wider than the level's are passed to functions that are inlined
    "-Werror=implicit-function-declaration",
    "-fvisibility=hidden",
]
# The two casts are no part of "undefined", and the first mistake ends the program.
SANITIZE = [
    "-g",
    "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Long unrolled loops, checked, take minutes to optimise; those for newer instruction sets do so at
# any level but none.
SANITIZE_UNROLLED = ["-O1", "-g1"]
SANITIZE_NEWER = ["-O0", "-g1"]
# Where few wait for the code, or it is spelt out for the machine: compiling that well takes most of
# the build.
PLAIN = ["-O2"]
# Flags of each instruction set that kernels.c is compiled for, by its name in the library.
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2"],
    "avx512": AVX512,
}
# Products are no one's bytes to meet: there a*b+c may be contracted, and half precision converted.
MATMUL = ["-ffp-contract=fast"]
MATMUL_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*AVX512, "-mfma", "-mf16c"],
}
# Files for newer instruction sets, left out where the compiler doesn't know them: the macro that
# says that the library has it, and the flags. Each needs those before.
NEWER = {
    "matmul_int8": ("QM_AVX512VNNI", ["-mavx512vbmi", "-mavx512vnni"]),
    "matmul_bf16": ("QM_AVX512BF16", ["-mavx512bf16"]),
    "matmul_amx": ("QM_AMX", ["-mamx-tile", "-mamx-bf16", *PLAIN]),
}


def _newer(compiler: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The files of NEWER that the compiler can make, with their flags; and the macros."""
    found: dict[str, list[str]] = {}
    macros: list[str] = []
    flags = MATMUL_LEVELS["avx512"]
    for name, (macro, more) in NEWER.items():
        flags = [*flags, *more]
        asked = [*compiler, *flags, "-fsyntax-only", "-x", "c", os.devnull]
        try:
            subprocess.run(asked, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            break
        found[name] = flags
        macros.append(f"-D{macro}")
    return found, macros


def compile_library(
    out: Path, *, sanitize: bool = False, only: Collection[str] | None = None
) -> None:
    """Compile ``c/*.c`` into the shared library ``out``.

    Args:
        out: the file to write.
        sanitize: with AddressSanitizer and UBSan.
        only: the files (``"quantize"``) they look at, all if None: matmul's take minutes. With it
            the code for newer instruction sets is left out.

    Raises:
        RuntimeError: there is no C compiler, or it failed (its messages are on stderr).
    """
    folder = Path(__file__).parent / "src" / "quantmill_cpu" / "c"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = list(FLAGS)
    x86 = sysconfig.get_platform().endswith("x86_64")
    newer, macros = _newer(compiler) if x86 and only is None else ({}, [])
    # Object, file, its flags; those that take longest first.
    sources = [(name, name, [*extra, *MATMUL]) for name, extra in newer.items()]
    plain = ("quantize", "round", "panels", "pool", "operator", "ggml", "ggml_codes", "columns")
    sources += [(name, name, []) for name in (*plain, "product", "moments", "attention", "linear")]
    flags += ["-DQM_X86_LEVELS", *macros] if x86 else []
    for level in LEVELS if x86 else ["baseline"]:
        name = [f"-DQM_LEVEL={level}"]
        if x86 and level == "baseline":
            name += PLAIN
        sources += [
            (f"kernels_{level}", "kernels", [*LEVELS[level], *name]),
            (f"columns_{level}", "columns_tile", [*LEVELS[level], *name]),
            (f"ggml_{level}", "ggml_types", [*LEVELS[level], *name]),
            (f"rows_{level}", "ggml_rows", [*MATMUL_LEVELS[level], *MATMUL, *name]),
            (f"product_{level}", "product_tile", [*MATMUL_LEVELS[level], *MATMUL, *name]),
            (f"fp32_{level}", "matmul_fp32", [*MATMUL_LEVELS[level], *MATMUL, *name]),
        ]
    sources += [(name, name, MATMUL) for name in ("matmul", "matmul_weight")]
    if "matmul_bf16" in newer:
        for name in ("moments_bf16", "attention_bf16", "linear_bf16"):
            sources.append((name, name, newer["matmul_bf16"]))
    if "matmul_amx" in newer:
        sources.append(("tiles_amx", "tiles_amx", newer["matmul_amx"]))
    with tempfile.TemporaryDirectory() as scratch:
        jobs, objects = [], []
        for made, file, extra in sources:
            objects.append(str(Path(scratch) / f"{made}.o"))
            looked_at = sanitize and (only is None or file in only)
            checks = SANITIZE if looked_at else []
            if looked_at and file in NEWER:
                checks = [*SANITIZE, *SANITIZE_NEWER]
            elif looked_at and file.startswith(("matmul", "ggml")):
                checks = [*SANITIZE, *SANITIZE_UNROLLED]
            jobs.append(
                [*flags, *extra, *checks, "-c", str(folder / f"{file}.c"), "-o", objects[-1]]
            )
        # Renamed at the end: a process may have the old library mapped.
        temporary = out.with_name(out.name + ".new")
        checks = SANITIZE if sanitize else []
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda job: subprocess.run([*compiler, *job], check=True), jobs))
            link = [*flags, *checks, "-shared", "-o", str(temporary), *objects, "-lm"]
            subprocess.run([*compiler, *link], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"quantmill-cpu is compiled while it is installed, and {shlex.join(compiler)}"
                f" failed ({error}): install a C compiler (gcc or clang) or name one in CC"
            ) from error
        temporary.replace(out)


class NativeBuild(BuildHookInterface):  # type: ignore[type-arg]
    """Compile the library into the package and tag the wheel for the platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before the files are collected, for wheels and editable installs alike."""
        out = Path(self.root) / "src" / "quantmill_cpu" / "_native.so"
        compile_library(out, sanitize=bool(os.environ.get("QUANTMILL_CPU_SANITIZE")))
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
