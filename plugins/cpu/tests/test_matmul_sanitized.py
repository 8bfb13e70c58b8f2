"""Matmul under AddressSanitizer and UBSan: no shape or form makes it err.

Some cases, on the instruction sets whose code is compiled quickly. ``QUANTMILL_SANITIZE=all`` runs
every case on all of them, which takes minutes: do that when the C code of matmul was changed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from quantmill_cpu import native

ALL = os.environ.get("QUANTMILL_SANITIZE") == "all"
QUICK = ("matmul", "matmul_weight", "matmul_fp32", "panels", "pool", "quantize")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PACKAGE = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("matmul_cases.py")


@pytest.fixture(scope="module")
def runtime() -> str:
    """The sanitizer's library, which must be there before any other allocates."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    try:
        asked = [*compiler, "-print-file-name=libasan.so"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"there is no compiler {shlex.join(compiler)}")
    if not Path(found).is_absolute():
        pytest.skip(f"{shlex.join(compiler)} has no libasan.so")
    return str(Path(found).resolve())


@pytest.fixture(scope="module")
def sanitized(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="compiling is a hook of hatchling")
    spec = importlib.util.spec_from_file_location("cpu_build", PACKAGE / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    out: Path = tmp_path_factory.mktemp("sanitized") / "_native.so"
    build.compile_library(out, sanitize=True, only=None if ALL else QUICK)
    return out


def run(*arguments: str, preload: str) -> subprocess.CompletedProcess[str]:
    # Python and PyTorch keep what they allocated until the end: no leaks of ours.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    environment.pop("QUANTMILL_CPU_ISA", None)
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_no_shape_or_form_makes_it_err(runtime: str, sanitized: Path) -> None:
    done = run(str(sanitized), "all" if ALL else "some", preload=runtime)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr
    here = [*native.matmul_levels()]
    assert done.stdout.split() == (here if ALL else here[:3])


def test_a_mistake_would_be_seen(runtime: str, sanitized: Path) -> None:
    done = run(str(sanitized), "overflow", preload=runtime)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
