"""FP8 linears on a GPU beside bfloat16: time as a multiple, for the shapes of the issue.

    python benchmarks/fp8_linear.py [--tokens 4096] [--width 8192]

A ratio above 1 is faster than ``torch.nn.functional.linear`` in bfloat16. The linear is the one of
the plugin, with its kernels; times are the device's, cold, but for ``eager``, which are those of
calls one after another, started by Python; ``rounding_ms`` is what rounding the activations takes
of it. Each line also says how far the result is from the product with the dequantized weight.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantmill.forms import Blocks, Channel, Grouping, PerTensor, ScaledFloat
from quantmill.host import default_host
from quantmill.kernels import KernelRegistry
from quantmill_fp8.linear import rounding_kernel
from quantmill_fp8.native import BLOCK, Product, kind_of, unavailable


def seconds(call: Callable[[], Tensor], rounds: int = 30) -> float:
    """Median time of a call on the device, its weight not in the cache.

    Clearing the cache is queued before each call, so that the device has work while the host
    starts what is measured: the time is the device's.
    """
    sweep = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(rounds + 5):
        sweep.zero_()
        sweep.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) / 1000 for start, stop in events[5:])
    return times[rounds // 2]


def host_seconds(call: Callable[[], Tensor], rounds: int = 100) -> float:
    """Time of a call with the host waiting for none: what a small batch costs an eager model."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 4096])
    parser.add_argument("--width", type=int, default=8192)
    arguments = parser.parse_args()
    width = arguments.width
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    kernels = KernelRegistry(default_host().kernels)
    weight = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    groupings: dict[str, Grouping] = {
        "tensor": PerTensor(),
        "row": Channel(0),
        "block 128": Blocks(128, 128),
    }
    for tokens in arguments.tokens:
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        plain = seconds(lambda x=x: nn.functional.linear(x, weight))
        eager = host_seconds(lambda x=x: nn.functional.linear(x, weight))
        for name, grouping in groupings.items():
            kind = kind_of(grouping)
            reason = "no product" if kind is None else unavailable(kind, "cuda")
            row = {"tokens": tokens, "width": width, "scales": name, "bf16_ms": plain * 1000}
            row["bf16_eager_ms"] = eager * 1000
            if reason is not None:
                print(json.dumps({**row, "unavailable": reason}))
                continue
            form = ScaledFloat.quantize(weight, torch.float8_e4m3fn, grouping)
            wanted = nn.functional.linear(x.float(), form.dequantize(torch.float32))
            kernel = rounding_kernel(kernels, form, "bfloat16")
            product = Product(form, activations=kernel)
            error = float((product(x).float() - wanted).norm() / wanted.norm())
            ours = seconds(lambda: product(x))  # noqa: B023
            size = BLOCK if kind == "block" else None
            part = seconds(lambda: product.activations(x, size=size)[0])  # noqa: B023
            row |= {"ms": ours * 1000, "times_bf16": plain / ours, "off": error}
            row["eager_ms"] = host_seconds(lambda: product(x)) * 1000  # noqa: B023
            print(json.dumps({**row, "rounding_ms": part * 1000, "kernel": kernel is not None}))


if __name__ == "__main__":
    main()
