"""Quantizers and calibration under AddressSanitizer and UBSan: no shape or value makes them err."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PACKAGE = Path(__file__).parents[1]
LOOKED_AT = (
    *("quantize", "round", "panels", "kernels", "ggml", "ggml_codes", "ggml_types", "ggml_rows"),
    *("columns", "columns_tile", "moments", "moments_bf16", "attention", "attention_bf16"),
    *("linear", "linear_bf16", "product", "product_tile", "pool"),
)
PROGRAM = Path(__file__).with_name("edge_cases.py")


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
    """A library of its own; the installed one stays as it is."""
    pytest.importorskip("hatchling", reason="compiling is a hook of hatchling")
    spec = importlib.util.spec_from_file_location("cpu_build", PACKAGE / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    out: Path = tmp_path_factory.mktemp("sanitized") / "_native.so"
    build.compile_library(out, sanitize=True, only=LOOKED_AT)
    return out


def run(*arguments: str, preload: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("QUANTMILL_CPU_ISA", None)
    if preload:
        # Python and PyTorch keep what they allocated until the end: no leaks of ours.
        environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_no_shape_or_value_makes_it_err(runtime: str, sanitized: Path) -> None:
    done = run(str(sanitized), preload=runtime)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [level for level, _ in lines] == list(native.levels())
    assert len({digest for _, digest in lines}) == 1, "levels give different bytes"
    assert run().stdout == done.stdout, "the installed library gives different bytes"


def test_a_mistake_would_be_seen(runtime: str, sanitized: Path) -> None:
    done = run(str(sanitized), "overflow", preload=runtime)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
