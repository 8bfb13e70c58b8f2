"""The linears of every backend on CPU, one row of bf16 activations, beside bf16 ``F.linear``.

    python benchmarks/linears.py                                  all methods, 4096x4096
    python benchmarks/linears.py gptq-4 bnb-nf4 --rounds 60 --json out.json

What is timed is the module that ``quantize_model`` puts into a model, called as a model calls it.
Cold: each call takes another copy of it, over at least 256 MB, in turn with F.linear with a weight
as cold. Shown are lower quartiles, their ratio, and what is wanted of it: 0.20 for 4 bits, 0.35 for
8. Calibrated methods get random inputs: how long a product takes does not depend on the values.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from cpu_matmul import quartile, timed
from torch import Tensor, nn

import quantmill
from quantmill.kernels import Prepared
from quantmill.linear import FormLinear

CALIBRATED = ("gptq", "awq")
WANTED = {4: 0.20, 8: 0.35}
METHODS = {
    "bnb-nf4": 4,
    "gptq-4": 4,
    "gptq-8": 8,
    "awq-4": 4,
    "hqq-4": 4,
    "hqq-8": 8,
    "quanto-int4": 4,
    "quanto-int8": 8,
    "quanto-float8": 8,
    "torchao-intx4wo:granularity=PerGroup(64)": 4,
    "torchao-int8wo": 8,
    "torchao-float8wo": 8,
    "ct-int4:group_size=64": 4,
    "ct-int8": 8,
    "ct-fp8": 8,
    "fp8-row": 8,
    "fp8-block": 8,
}
"""Short names, and the bits of a weight."""


class Block(nn.Module):
    """What calibration takes for a block of a model."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def linear_of(method: str, size: int) -> nn.Module:
    """One linear ``[size, size]`` of a method."""
    torch.manual_seed(0)
    plain = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    model = nn.Sequential(Block(plain))
    more: dict[str, Any] = {}
    if method.startswith(CALIBRATED):
        more["calibration"] = [torch.randn(64, size, dtype=torch.bfloat16) for _ in range(4)]
    quantmill.quantize_model(model, method, **more)
    block: Any = model[0]
    made: nn.Module = block.proj.eval()
    return made


def kernel_of(linear: nn.Module) -> str:
    if not isinstance(linear, FormLinear):
        return f"of the library's own {type(linear).__bases__[0].__name__}"
    live = linear.live
    return live.kernel.name if isinstance(live, Prepared) else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--megabytes", type=int, default=256, help="of weights, at least")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    size, total = options.size, options.megabytes << 20
    floats = [torch.full((size, size), 0.5, dtype=torch.bfloat16)]
    floats += [floats[0].clone() for _ in range(max(1, total // (2 * size * size)))]
    x = torch.randn(1, size, dtype=torch.bfloat16)
    rows = []
    for name in options.methods or METHODS:
        bits, first = METHODS[name], linear_of(name, size)
        count = max(2, -(-total * 8 // (bits * size * size)))
        copies = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        for linear in copies:
            linear(x)  # some pack their weight in the first call
        own, plain = [], []
        for turn in range(options.rounds):
            own.append(timed(copies[turn % count], x))
            plain.append(timed(torch.nn.functional.linear, x, floats[turn % len(floats)]))
        row = {
            "method": name,
            "bits": bits,
            "kernel": kernel_of(first),
            "milliseconds": 1e3 * quartile(own),
            "of_linear_bf16": quartile(own) / quartile(plain),
            "wanted": WANTED[bits],
        }
        rows.append(row)
        print(
            f"{name:42} {row['milliseconds']:.3f} ms  of bf16 F.linear {row['of_linear_bf16']:.2f}"
            f" ({row['wanted']:.2f} wanted)  {row['kernel']}",
            flush=True,
        )
    if options.json:
        text = json.dumps({"size": size, "threads": options.threads, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
