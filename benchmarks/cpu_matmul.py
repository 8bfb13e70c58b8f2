"""Native CPU matmul: time beside reading the same bytes, and beside bf16 ``F.linear``.

    python benchmarks/cpu_matmul.py                      all formats, 4096x4096 and 4096x11008
    python benchmarks/cpu_matmul.py nf4 int4-g128 --batch 1 32 --rounds 60 --json out.json
    python benchmarks/cpu_matmul.py q4_0 q8_0 q4_k q6_k --llama BUILD/bin     beside llama.cpp's own

Cold: each call takes another copy of the weight, over at least 256 MB (``--megabytes``). In each
round take turns: a call as a linear makes it, the kernel alone (the C function, its result's memory
given), a plain read of another copy of the weight, and F.linear with a bf16 weight of the same
shape, as cold too; so whatever else the machine does meets them all. Shown are the lower quartiles
over the rounds, and ratios of these: ``share`` is the read's time by the call's, or by the
kernel's. The call has to fetch PyTorch's own code from memory, too, after so much else was read.

With ``--llama``, the folder of llama.cpp's libraries, the kernel is also compared with its product
of the same blocks with float32 activations, which it rounds to 8 bits: a graph of one product for
each copy, in the same turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ggml_matmul import GgmlMatmul
from torch import Tensor

from quantmill.forms import Affine, Blocks, Channel, Codebook, Codes, Flat, Form, Group, ScaledFloat
from quantmill.kernels import Prepared
from quantmill.registrations import Kernel
from quantmill_cpu import native
from quantmill_cpu.matmul import bind
from quantmill_cpu.operators import torch_library
from quantmill_cpu.pages import large_pages
from quantmill_cpu.plugin import quantmill_kernels
from quantmill_gguf.encode import encode
from quantmill_gguf.types.raw import RawForm
from quantmill_gguf.types.sizes import BY_NAME

BFLOAT16 = 1  # among the dtypes of the C function
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


def blocks_of(type_name: str, shape: tuple[int, int]) -> Tensor:
    return encode(type_name, torch.randn(64, shape[1])).repeat(shape[0] // 64, 1)


def ggml(type_name: str) -> Callable[[tuple[int, int]], Form]:
    return lambda shape: RawForm(blocks_of(type_name, shape), type_name).regular()


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
    **{name.lower(): ggml(name) for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K")},
    **{name.lower(): ggml(name) for name in ("Q2_K", "Q3_K", "Q5_K", "IQ4_XS", "MXFP4")},
}


def quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def copies(live: Prepared, count: int) -> list[Prepared]:
    def copy() -> dict[str, Tensor]:
        return {
            name: large_pages(tensor.numel()).copy_(tensor) if name == "weight" else tensor
            for name, tensor in live.tensors.items()
        }

    return [live, *(Prepared(live.kernel, live.skeleton, copy()) for _ in range(count - 1))]


def measure(
    kernel: Kernel,
    form: Form,
    floats: list[Tensor],
    peer: GgmlMatmul | None,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    library, threads = torch_library(), torch.get_num_threads()
    first = Prepared.of(kernel, form)
    size, total = first.nbytes, options.megabytes << 20
    # Three of them are read in a turn, none of them a second time before all others.
    lives = copies(first, max(6, -(-total // size)))
    third = len(lives) // 3
    bound = [bind(live) for live in lives]
    addresses = [live.tensors["weight"].data_ptr() for live in lives]
    found = []
    for batch in options.batch:
        x = torch.randn(batch, form.shape[1], dtype=torch.bfloat16)
        y = torch.empty(batch, form.shape[0], dtype=torch.bfloat16)
        ends = x.data_ptr(), None, y.data_ptr(), BFLOAT16, batch, threads
        times: dict[str, list[float]] = {name: [] for name in ("call", "kernel", "read", "linear")}
        theirs: list[float] = []
        for turn in range(options.rounds):
            call = bound[turn % len(lives)]
            one, two = (addresses[(turn + k * third) % len(lives)] for k in (1, 2))
            weight = floats[turn % len(floats)]
            times["call"].append(timed(call, x, None))
            times["kernel"].append(timed(library.qm_matmul, one, *ends))
            times["read"].append(timed(library.qm_read, two, size, threads))
            if turn % 3 == 0:
                times["linear"].append(timed(torch.nn.functional.linear, x, weight))
            if peer is not None and turn % 10 == 0:
                theirs.append(peer.seconds(batch, threads))
        best = {name: quartile(seconds) for name, seconds in times.items()}
        row = {
            "batch": batch,
            "bytes": size,
            "milliseconds": best["call"] * 1e3,
            "kernel_milliseconds": best["kernel"] * 1e3,
            "read_gigabytes_per_second": size / best["read"] / 1e9,
            "share_of_read": best["read"] / best["call"],
            "kernel_share_of_read": best["read"] / best["kernel"],
            "linear_bf16_milliseconds": best["linear"] * 1e3,
            "of_linear_bf16": best["call"] / best["linear"],
        }
        if theirs:
            row["of_llamacpp"] = best["kernel"] / quartile(theirs)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 4, 16, 32, 64))
    parser.add_argument("--megabytes", type=int, default=256, help="of weights, at least")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's libraries")
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
            peer = None
            if options.llama and name.upper() in BY_NAME:
                blocks = blocks_of(name.upper(), (out, width))
                count = max(2, -(-(options.megabytes << 20) // blocks.numel()))
                peer = GgmlMatmul(options.llama, name.upper(), blocks, width, count)
            for row in measure(kernels[form.kind], form, floats, peer, options):
                results.append({"format": name, "shape": [out, width], **row})
                beside = f"  of llama.cpp {row['of_llamacpp']:.2f}" if peer else ""
                print(
                    f"{name:11} {shape_name} batch {row['batch']:3}"
                    f"  call {row['milliseconds']:.3f} ms, kernel {row['kernel_milliseconds']:.3f}"
                    f"  share of read {row['share_of_read']:.2f}, {row['kernel_share_of_read']:.2f}"
                    f" (of {row['read_gigabytes_per_second']:.1f} GB/s)"
                    f"  of bf16 F.linear {row['of_linear_bf16']:.2f}{beside}",
                    flush=True,
                )
    if options.json:
        head = {"level": native.matmul_level(), "threads": options.threads}
        text = json.dumps({**head, "rounds": options.rounds, "results": results}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
