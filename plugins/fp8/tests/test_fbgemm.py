"""FBGEMM itself, where it is installed, and one of a wrong version, which must not be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target, write_tiny_llama
from quantmill_fp8.config import FbgemmFp8Config
from quantmill_fp8.fbgemm import installed, problem
from quantmill_fp8.quantizer import RowQuantizer


@pytest.mark.interop
@pytest.mark.skipif(problem() is not None, reason=str(problem()))
def test_fbgemm_reads_our_bytes_and_rounds_alike() -> None:
    pytest.importorskip("fbgemm_gpu")
    ops = torch.ops.fbgemm
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) * 0.08
    quantizer: Any = RowQuantizer(
        FbgemmFp8Config(), device=torch.device("cpu"), kernels=KernelRegistry([])
    )
    form = quantizer.quantize(make_target(48, 96), MatrixSource(weight))
    stored, scale = form.values.view(torch.uint8), form.scale.reshape(-1, 1)
    # Its floats of 8 bits are told exponent bits, bias and largest number: those of E4M3.
    assert torch.equal(ops.HFP8QuantizedToFloat(stored, 4, 7) * scale, form.dequantize())
    assert torch.equal(ops.FloatToHFP8Quantized(weight / scale, 4, 7, 448.0), stored)


WRONG = """
raise SystemExit("an FBGEMM of a wrong version was imported")
"""
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import quantmill
plan = quantmill.plan(sys.argv[2], "fp8-row")
print(*[f"{item.code} {item.cause} {item.fix}" for item in plan.findings], sep="\\n")
needs = quantmill.default_host().methods["fbgemm-fp8"].requirements
print("doctor:", *[f"{item.distribution}{item.versions}" for item in needs])
assert "fbgemm_gpu" not in sys.modules
"""


@pytest.mark.skipif(installed() is not None, reason="another FBGEMM is installed")
def test_a_wrong_version_on_the_path_is_a_finding_with_the_right_one(tmp_path: Path) -> None:
    package, info = tmp_path / "site" / "fbgemm_gpu", tmp_path / "site"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WRONG)
    info = info / "fbgemm_gpu_cpu-0.8.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fbgemm-gpu-cpu\nVersion: 0.8.0\n")
    folder = write_tiny_llama(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "site"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    minor = int(torch.__version__.split(".")[1])
    assert "QM-FP8-016 fbgemm-gpu-cpu 0.8.0 is built against another PyTorch" in done.stdout
    assert f'pip install "fbgemm-gpu-cpu==1.{minor - 5}.0"' in done.stdout
    assert f"doctor: fbgemm-gpu-cpu==1.{minor - 5}.0" in done.stdout
