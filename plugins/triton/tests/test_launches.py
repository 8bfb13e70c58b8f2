"""A launch that was made before hands the driver what Triton's own launch would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmill_triton.available import gluon_known
from quantmill_triton.launches import Launch, on_its_device

HERE = Path(__file__).parent


def test_a_launch_made_again_gives_the_driver_the_same(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (PyTorch's CUDA wheels bring it)")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, HERE / "recorded_launches.py", *(["streamed"] if gluon_known() else [])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8 + gluon_known()
    for name, (first, again) in found.items():
        assert first == again, name
        assert len(first) > 12, name


class Kernel:
    """Counts what asks Triton for the compiled kernel, and what only runs it."""

    arg_names = ("x", "y", "n", "B", "A")

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Compiled:
            self.calls.append(("triton", grid, args[2], kwargs))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.calls.append(("again", grid, *args[2:]))


def test_triton_is_asked_once_for_each_kind_of_argument() -> None:
    kernel = Kernel()
    launch = Launch(kernel, (3, 1, 1), {"A": 1, "B": 2}, {"num_warps": 4})
    x = torch.zeros(64)
    asked = ("triton", (3, 1, 1), 5, {"A": 1, "B": 2, "num_warps": 4})
    launch((x, x), (5,))
    launch((x, torch.ones(64)), (5,))
    assert kernel.calls == [asked, ("again", (3, 1, 1), 5, 2, 1)]
    # Another number, another dtype, and an address for which Triton compiles another kernel.
    for tensors, number in (((x, x), 6), ((x, x.half()), 5), ((x, x[1:]), 5), ((x, x[1:]), 5)):
        launch(tensors, (number,))
        assert kernel.calls[-1][0] == "triton"
    launch((x, x.half()), (5,))
    assert kernel.calls[-1][0] == "again"


def test_an_operator_on_the_cpu_asks_for_no_device() -> None:
    assert torch.equal(on_its_device(lambda x, y: x + y)(torch.ones(2), 1), torch.full((2,), 2.0))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    from quantmill.forms import Affine, Group
    from quantmill.kernels import Prepared
    from quantmill_triton.activations import activations
    from quantmill_triton.matmul import bind
    from quantmill_triton.plugin import quantmill_kernels

    kernel = next(k for k in quantmill_kernels() if k.name == "triton-matmul-affine-group")
    form = Affine.quantize(torch.randn(256, 8192), 4, Group(128), scale_dtype=torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        here = form.to(device)
        matmul = bind(Prepared.of(kernel, here))
        for rows in (1, 3, 500):
            x = torch.full((rows, 8192), 0.5, dtype=torch.bfloat16, device=device)
            for _ in range(2):
                results.append(matmul(x, None))
            codes, scale = activations(x)
            assert codes.device == scale.device == x.device
            torch.testing.assert_close(codes.float() * scale, x.float())
        torch.testing.assert_close(results[-1], here.matmul(x), rtol=2e-2, atol=0.5)
    assert torch.cuda.current_device() == 0
    half = len(results) // 2
    for first, second in zip(results[:half], results[half:], strict=True):
        assert torch.equal(first.cpu(), second.cpu())
