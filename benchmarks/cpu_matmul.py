"""Native CPU matmul: time beside reading the same bytes, and beside bf16 ``F.linear``.

    python benchmarks/cpu_matmul.py                      all formats, 4096x4096 and 4096x11008
    python benchmarks/cpu_matmul.py nf4 int4-g128 --batch 1 32 --rounds 60 --json out.json

Cold: each call takes another copy of the weight, over at least 256 MB (``--megabytes``). In each
round the kernel, a plain read of as many bytes from memory as cold, and F.linear with a bf16 weight
of the same shape, as cold too, take turns; so whatever else the machine does meets all three. Shown
are the lower quartiles over the rounds, and ratios of these: ``share`` is the read's time by the
kernel's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.forms import Affine, Blocks, Channel, Codebook, Codes, Flat, Form, Group, ScaledFloat
from quantmill.kernels import Prepared
from quantmill.registrations import Kernel
from quantmill_cpu import native
from quantmill_cpu.matmul import bind, torch_library
from quantmill_cpu.plugin import quantmill_kernels
from quantmill_gguf.encode import encode
from quantmill_gguf.types.raw import RawForm

SHAPES = ("4096x4096", "11008x4096")
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def codes(shape: tuple[int, int], bits: int, packing: str = "dense") -> Codes:
    made = Codes.empty(shape, bits, packing)
    made.data.random_(0, 256) if packing != "i8" else made.data.random_(-127, 128)
    return made


def affine(bits: int, size: int) -> Callable[[tuple[int, int]], Form]:
    def make(shape: tuple[int, int]) -> Form:
        groups = (shape[0], shape[1] // size)
        zero = torch.randint(0, 2**bits, groups, dtype=torch.uint8)
        packing = "u8" if bits == 8 else "dense"
        scale = torch.rand(groups).to(torch.float16) / 2**bits
        return Affine(codes(shape, bits, packing), scale, Group(size), zero, "zero")

    return make


def nf4(shape: tuple[int, int], nested: bool = False) -> Form:
    count = shape[0] * shape[1] // 64
    scale: Tensor | Form = torch.rand(count) + 0.5
    if nested:
        table, level = torch.linspace(-1, 1, 256), torch.rand(-(-count // 256))
        inner = Codes(torch.randint(0, 256, (count,), dtype=torch.uint8), 8, (count,), "u8")
        scale = Codebook(inner, table, level, Flat(256), offset=torch.tensor(1.5))
    return Codebook(codes(shape, 4, "hi4"), torch.tensor(NF4), scale, Flat(64))


def int8_rows(shape: tuple[int, int]) -> Form:
    scale = torch.rand(shape[0])
    return Affine(codes(shape, 8, "i8"), scale, Channel(0), factor=1 / 127)


def float8(shape: tuple[int, int]) -> Form:
    weight = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    blocks = Blocks(128, 128)
    return ScaledFloat(weight, torch.rand(blocks.scale_shape(shape)), blocks)


def ggml(type_name: str) -> Callable[[tuple[int, int]], Form]:
    def make(shape: tuple[int, int]) -> Form:
        rows = encode(type_name, torch.randn(64, shape[1]))
        return RawForm(rows.repeat(shape[0] // 64, 1), type_name).regular()

    return make


FORMATS: dict[str, Callable[[tuple[int, int]], Form]] = {
    "int4-g128": affine(4, 128),
    "int4-g32": affine(4, 32),
    "nf4": nf4,
    "nf4-nested": lambda shape: nf4(shape, nested=True),
    "int8-g128": affine(8, 128),
    "int8-rows": int8_rows,
    "fp8-blocks": float8,
    "int2-g64": affine(2, 64),
    "int3-g128": affine(3, 128),
    "int1-g128": affine(1, 128),
    "int5-g128": affine(5, 128),
    "int6-g128": affine(6, 128),
    "q4_0": ggml("Q4_0"),
    "q8_0": ggml("Q8_0"),
    "q4_k": ggml("Q4_K"),
    "q6_k": ggml("Q6_K"),
}


def quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copies(live: Prepared, count: int) -> list[Prepared]:
    def copy() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in live.tensors.items()}

    return [live, *(Prepared(live.kernel, live.skeleton, copy()) for _ in range(count - 1))]


def measure(
    kernel: Kernel, form: Form, floats: list[Tensor], options: argparse.Namespace
) -> list[dict[str, Any]]:
    library, threads = torch_library(), torch.get_num_threads()
    first = Prepared.of(kernel, form)
    size, total = first.nbytes, options.megabytes << 20
    lives = [bind(live) for live in copies(first, max(2, -(-total // size)))]
    memory = [torch.ones(size, dtype=torch.uint8) for _ in lives]
    found = []
    for batch in options.batch:
        x = torch.randn(batch, form.shape[1], dtype=torch.bfloat16)
        own: list[float] = []
        read: list[float] = []
        linear: list[float] = []
        for turn in range(options.rounds):
            live, plain = lives[turn % len(lives)], memory[turn % len(lives)]
            weight = floats[turn % len(floats)]
            own.append(timed(lambda live=live, x=x: live(x, None)))  # type: ignore[misc]
            read.append(
                timed(lambda plain=plain: library.qm_read(plain.data_ptr(), size, threads))  # type: ignore[misc]
            )
            if turn % 3 == 0:
                linear.append(
                    timed(lambda weight=weight, x=x: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
                )
        best = quartile(own)
        found.append(
            {
                "batch": batch,
                "bytes": size,
                "milliseconds": best * 1e3,
                "gigabytes_per_second": size / best / 1e9,
                "read_gigabytes_per_second": size / quartile(read) / 1e9,
                "share_of_read": quartile(read) / best,
                "linear_bf16_milliseconds": quartile(linear) * 1e3,
                "of_linear_bf16": best / quartile(linear),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 4, 16, 32, 64))
    parser.add_argument("--megabytes", type=int, default=256, help="of weights, at least")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", default="", help="instruction set (default: the best)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    unknown = set(options.formats) - set(FORMATS)
    if unknown:
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    native.use_matmul_level(options.level)
    kernels = {kernel.form: kernel for kernel in quantmill_kernels() if kernel.prepare}
    print(f"{native.matmul_level()}, {options.threads} threads, bf16 activations")
    results = []
    for shape_name in options.shape:
        out, width = map(int, shape_name.split("x"))
        count = max(2, -(-(options.megabytes << 20) // (out * width * 2)))
        floats = [torch.full((out, width), 0.5, dtype=torch.bfloat16) for _ in range(count)]
        for name in options.formats or FORMATS:
            form = FORMATS[name]((out, width))
            for row in measure(kernels[form.kind], form, floats, options):
                results.append({"format": name, "shape": [out, width], **row})
                print(
                    f"{name:11} {shape_name} batch {row['batch']:3}"
                    f"  {row['milliseconds']:7.3f} ms {row['gigabytes_per_second']:5.1f} GB/s"
                    f"  share of read {row['share_of_read']:.2f}"
                    f" (of {row['read_gigabytes_per_second']:.1f} GB/s)"
                    f"  of bf16 F.linear {row['of_linear_bf16']:.2f}",
                    flush=True,
                )
    if options.json:
        head = {"level": native.matmul_level(), "threads": options.threads}
        text = json.dumps({**head, "rounds": options.rounds, "results": results}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
