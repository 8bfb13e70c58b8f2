"""FP8 linears on a GPU beside bfloat16: time as a multiple, for the shapes of the issue.

    python benchmarks/fp8_linear.py [--tokens 4096] [--width 8192]

A ratio above 1 is faster than ``torch.nn.functional.linear`` in bfloat16. The linear is the one of
the plugin, with its kernels; ``rounding_ms`` is what rounding the activations takes of it. Each
line also says how far the result is from the product with the dequantized weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantmill.forms import Blocks, Channel, Grouping, PerTensor, ScaledFloat
from quantmill.host import default_host
from quantmill.kernels import KernelRegistry
from quantmill_fp8.linear import rounding_kernel
from quantmill_fp8.native import BLOCK, kind_of, plain_activations, scaled_product, unavailable


def seconds(call: Callable[[], Tensor], rounds: int = 20) -> float:
    """Median time of a call on the device."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return sorted(times)[rounds // 2]


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
        for name, grouping in groupings.items():
            kind = kind_of(grouping)
            reason = "no product" if kind is None else unavailable(kind, "cuda")
            row = {"tokens": tokens, "width": width, "scales": name, "bf16_ms": plain * 1000}
            if reason is not None:
                print(json.dumps({**row, "unavailable": reason}))
                continue
            form = ScaledFloat.quantize(weight, torch.float8_e4m3fn, grouping)
            wanted = nn.functional.linear(x.float(), form.dequantize(torch.float32))
            kernel = rounding_kernel(kernels, form, "bfloat16")
            found = scaled_product(x, form, activations=kernel)
            ours = seconds(lambda: scaled_product(x, form, activations=kernel))  # noqa: B023
            rounding = kernel or plain_activations
            size = BLOCK if kind == "block" else None
            part = seconds(lambda: rounding(x, size=size)[0])  # noqa: B023
            error = float((found.float() - wanted).norm() / wanted.norm())
            row |= {"ms": ours * 1000, "times_bf16": plain / ours, "off": error}
            print(json.dumps({**row, "rounding_ms": part * 1000, "kernel": kernel is not None}))


if __name__ == "__main__":
    main()
