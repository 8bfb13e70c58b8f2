"""4-bit matmul on a GPU beside bf16 cuBLAS, bitsandbytes NF4 and torch's int4.

    python benchmarks/triton_matmul.py [--shapes 8192x8192 ...] [--rows 1 16 64 256 4096] [--json]

Shapes are OUTxIN. Weights are cold: each call reads another copy, of at least 300 MB in all. Times
are of one call in a replayed CUDA graph of many (the median of replays), in turn for every
implementation, so launches cost what they cost a captured model; `eager` is the time of a call
from Python, back to back. Errors are relative to float64 on the dequantized weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from quantmill.forms import Affine, Codebook, Form, Group
from quantmill.kernels import Prepared
from quantmill_triton import launch
from quantmill_triton.matmul import matmul
from quantmill_triton.plugin import quantmill_kernels

COLD_BYTES = 300 << 20
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def time_graph(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """A function that replays a graph of all calls: microseconds of one."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / len(kept)

    return replay


def time_eager(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Microseconds of a call from Python, the GPU's queue kept full."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (repeats * len(calls))


def copies_of(size: int) -> int:
    return 1 + -(-COLD_BYTES // size)


def ours(form: Form, name: str) -> tuple[list[Callable[..., Any]], int]:
    kernel = next(k for k in quantmill_kernels() if k.name == name)
    live = Prepared.of(kernel, form)
    lives = [live] + [
        Prepared(kernel, live.skeleton, {key: t.clone() for key, t in live.tensors.items()})
        for _ in range(copies_of(live.nbytes) - 1)
    ]
    return [partial(lambda live, x: matmul(x, live, None), live) for live in lives], live.nbytes


def dense(weight: torch.Tensor) -> tuple[list[Callable[..., Any]], int]:
    size = weight.numel() * 2
    weights = [weight] + [weight.clone() for _ in range(copies_of(size) - 1)]
    return [partial(lambda w, x: torch.nn.functional.linear(x, w), w) for w in weights], size


def bitsandbytes_nf4(weight: torch.Tensor) -> tuple[list[Callable[..., Any]], int]:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    size = packed.numel() + state.absmax.numel() * 4
    held = [packed] + [packed.clone() for _ in range(copies_of(size) - 1)]
    return [
        partial(lambda p, x: bnb.matmul_4bit(x, p.t(), quant_state=state), p) for p in held
    ], size


def torch_int4(form: Affine) -> tuple[list[Callable[..., Any]], int]:
    codes = form.codes.unpack()
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    assert isinstance(form.scale, torch.Tensor)
    assert isinstance(form.offset, torch.Tensor)
    # torch's value is (code - 8) * scale + zero.
    scale = form.scale.float()
    zero = (8 - form.offset) * scale
    both = torch.stack([scale.t(), zero.t()], dim=-1).to(torch.bfloat16).contiguous()
    size = packed.numel() * packed.element_size() + both.numel() * 2
    held = [packed] + [packed.clone() for _ in range(copies_of(size) - 1)]
    mm = torch.ops.aten._weight_int4pack_mm
    return [partial(lambda p, x: mm(x, p, 128, both), p) for p in held], size


def measure(shape: str, batches: list[int]) -> Iterator[dict[str, Any]]:
    """The results of one shape, batch by batch."""
    out, columns = (int(part) for part in shape.split("x"))
    torch.manual_seed(0)
    weight = torch.randn((out, columns), device="cuda", dtype=torch.bfloat16) * 0.02
    affine = Affine.quantize(weight, 4, Group(128), scale_dtype=torch.bfloat16)
    table = torch.tensor(NF4, device="cuda")
    codebook = Codebook.quantize(weight, table, 64, bits=4, packing="hi4", table_name="nf4")
    exact = {
        "bf16 cuBLAS": weight,
        "int4 g128": affine.dequantize(torch.float32),
        "torch int4": affine.dequantize(torch.float32),
        "nf4": codebook.dequantize(torch.float32),
        "bitsandbytes nf4": codebook.dequantize(torch.float32),
    }
    sides: dict[str, tuple[list[Callable[..., Any]], int]] = {
        "bf16 cuBLAS": dense(weight),
        "int4 g128": ours(affine, "triton-matmul-affine-group"),
        "nf4": ours(codebook, "triton-matmul-codebook"),
    }
    for name, make in (
        ("bitsandbytes nf4", lambda: bitsandbytes_nf4(weight)),
        ("torch int4", lambda: torch_int4(affine)),
    ):
        try:
            sides[name] = make()
        except Exception as error:  # noqa: BLE001 a peer that is missing is a line less
            print(f"{name}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    for batch in batches:
        x = torch.randn((batch, columns), device="cuda", dtype=torch.bfloat16)
        timers, entries = {}, {}
        for name, (calls, size) in sides.items():
            bound = [partial(call, x) for call in calls]
            expected = x[:64].double() @ exact[name].double().t()
            error = ((bound[0]()[:64].double() - expected).norm() / expected.norm()).item()
            entries[name] = {"shape": shape, "rows": batch, "name": name, "error": error}
            entries[name]["bytes"] = size + 2 * batch * (columns + out)
            try:
                timers[name] = time_graph(bound)
            except Exception as problem:  # noqa: BLE001 likewise
                print(f"{name}: {str(problem)[:100]}", file=sys.stderr)
            if batch == 1:
                entries[name]["eager_us"] = time_eager(bound)
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(13 if batch < 1000 else 4):
            for name, timer in timers.items():
                times[name].append(timer())
        base = statistics.median(times["bf16 cuBLAS"][1:])
        for name, found in times.items():
            spent = statistics.median(found[1:])
            entries[name].update(us=spent, ratio=base / spent, spread=max(found[1:]) - min(found))
            yield entries[name]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    spent = time_graph([partial(target.copy_, source)] * 5)
    return 4 * source.numel() / (statistics.median(spent() for _ in range(5)) * 1e-6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["8192x8192", "28672x8192", "8192x28672"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 4096])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth()
    results = (row for shape in args.shapes for row in measure(shape, args.rows))
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth,
        "buffer_bytes": launch.BUFFER_BYTES,
    }
    if args.json:
        print(json.dumps({**about, "results": list(results)}))
        return 0
    print(f"{about['device']}, torch {about['torch']}, copies {bandwidth / 1e12:.2f} TB/s")
    print(f"large batches hold up to {launch.BUFFER_BYTES >> 20} MiB of dequantized weight")
    print(f"{'OUTxIN':>11} {'rows':>5} {'':17} {'us':>8} {'speed':>8} {'of copy':>8} {'error':>8}")
    for row in results:
        share = row["bytes"] / row["us"] / 1e-6 / bandwidth
        eager = f"  eager {row['eager_us']:.0f} us" if "eager_us" in row else ""
        print(
            f"{row['shape']:>11} {row['rows']:>5} {row['name']:17} {row['us']:8.1f}"
            f" {row['ratio']:8.2f} {share:8.0%} {row['error']:8.1e}{eager}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
