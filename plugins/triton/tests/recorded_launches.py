"""What a CUDA driver would be given: run as a program, with a driver that only records.

Kernels are compiled for a Hopper GPU, which takes no GPU. Each call is made twice; the first
launch of each is Triton's own. Prints, as JSON, both launches of each case: grid, and arguments
with addresses, which are the same for both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from quantmill.forms import Affine, Codebook, Group
from quantmill.kernels import Prepared
from quantmill_triton import launch
from quantmill_triton.activations import _activations
from quantmill_triton.calls import arguments
from quantmill_triton.facts import Facts
from quantmill_triton.plugin import quantmill_kernels

LAUNCHES: list[Any] = []


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class Recorder:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *given: Any) -> None:
        # The grid, stream, function and metadata; then three of hooks; then the arguments.
        LAUNCHES.append([*map(shown, (*given[:6], *given[9:]))])


class Driver:
    utils = Utils()
    launcher_cls = Recorder

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 7

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def shown(item: Any) -> str:
    if isinstance(item, torch.Tensor):
        return f"{item.dtype} {list(item.shape)} {item.stride()}"
    if hasattr(item, "base"):
        return f"{shown(item.base)} {item.shape} {item.strides} {item.block_shape}"
    return str(item)


def twice(call: Callable[[], Any]) -> list[Any]:
    LAUNCHES.clear()
    for _ in range(2):
        call()
    return list(LAUNCHES)


def prepared(form: Affine | Codebook, name: str) -> Callable[..., Callable[[], Any]]:
    kernel = next(item for item in quantmill_kernels() if item.name == name)
    live = Prepared.of(kernel, form)
    tensors, numbers, factor = arguments(live.tensors, live.skeleton)
    weight = launch.Weight(*tensors)  # type: ignore[arg-type]
    facts = Facts(*numbers)

    def case(x: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[[], Any]:
        return lambda: launch.matmul(x, weight, bias, facts, factor)

    return case


def main() -> None:
    driver.set_active(Driver())
    # A processor's tensors stand in for the device's, whose facts are an H200's.
    launch._machine = lambda _: launch._Machine(132, 227 << 10, True, True, True)  # type: ignore[assignment]
    bf16, fp16 = torch.bfloat16, torch.float16
    rows = torch.zeros(16, 8192)
    affine = prepared(
        Affine.quantize(torch.randn(512, 8192), 4, Group(128), scale_dtype=bf16),
        "triton-matmul-affine-group",
    )
    wide = prepared(
        Affine.quantize(torch.randn(1024, 1 << 16), 4, Group(128), scale_dtype=bf16),
        "triton-matmul-affine-group",
    )
    table = torch.linspace(-1, 1, 16)
    paired = prepared(
        Codebook.quantize(torch.randn(512, 8192), table, 64, bits=4, packing="hi4"),
        "triton-matmul-codebook",
    )
    cases: dict[str, Callable[[], Any]] = {
        "one row": affine(rows[:1].to(bf16)),
        "bias": affine(rows[:1].to(fp16), torch.zeros(512, dtype=fp16)),
        "strided": affine(torch.zeros(4, 8200, dtype=bf16)[:, :8192]),
        "unaligned": affine(torch.zeros(4 * 8200, dtype=bf16)[1:-7].view(4, -1)[:, :8192]),
        "table": paired(rows[:4].to(fp16)),
        "whole": affine(torch.zeros(600, 8192, dtype=bf16)),
        "activations": lambda: _activations(rows.to(bf16), 0, 10.0, 16),
        "blocks": lambda: _activations(rows.to(bf16), 128, 10.0, 16),
    }
    if "streamed" in sys.argv:
        cases["streamed"] = wide(torch.zeros(16, 1 << 16, dtype=bf16))
    print(json.dumps({name: twice(call) for name, call in cases.items()}))


if __name__ == "__main__":
    main()
