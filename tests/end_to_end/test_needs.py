"""What plan and choose say a model needs, held against what a process then takes.

Weights within 2 %, peaks within 10 %, or 2 MiB of a model of 33 to 114: of loading the float model
with the method, of loading its checkpoint, of running, of training adapters, of quantizing.
``benchmarks/needs.py`` says how it is measured. A method of every backend is measured where
``QUANTMILL_ALL_BACKENDS`` is set (some ten minutes), else a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]

for _package in ("bnb", "compressed_tensors", "gguf", "transformers"):
    pytest.importorskip(f"quantmill_{_package}")
_native = pytest.importorskip("quantmill_cpu.native")
if (_why := _native.unavailable()) is not None:
    pytest.skip(f"estimates are those with native kernels: {_why}", allow_module_level=True)
pytestmark = pytest.mark.slow
FEW = ("bnb-nf4", "ct-int4")
OTHERS = (
    *("float", "bnb-int8", "gptq-4", "awq-4", "fp8-block", "fp8-row", "gguf-q4_0", "gguf-q4_k_m"),
    *("hqq-4", "quanto-int4", "quanto-int8", "torchao-int8wo", "torchao-int4wo", "ct-nvfp4"),
)
METHODS = FEW + (OTHERS if os.environ.get("QUANTMILL_ALL_BACKENDS") else ())
SLACK = 2 << 20
"""Quantizing takes 8 MiB with some methods, of which 10 % are what a process is off by anyway."""


@pytest.fixture(scope="module")
def benchmark(script: Script) -> ModuleType:
    return script("benchmarks/needs.py")


@pytest.fixture(scope="module")
def work(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needs")
    benchmark.fabricate(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_estimates_are_what_is_measured(benchmark: ModuleType, work: Path, method: str) -> None:
    training = "QUANTMILL_ALL_BACKENDS" in os.environ or method == FEW[0]
    row = benchmark.measure(work, method, context=512, training=training)
    assert "error" not in row, row["error"]
    for what, (said, found) in row["bytes"].items():
        if what.endswith("weights"):
            assert said == pytest.approx(found, rel=0.02), what
        else:
            assert said == pytest.approx(found, rel=0.1, abs=SLACK), what
    assert len(row["bytes"]) >= 3
