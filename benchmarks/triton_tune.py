"""Measure tile candidates of the Triton matmul on a GPU: what ``configs.py`` is filled from.

    python benchmarks/triton_tune.py OUT.json [--rows 1 16] [--shapes 8192x8192] [--kinds int4]

Shapes are OUTxIN. Each candidate is compiled beforehand in parallel, checked against the
dequantized weight, and timed as a CUDA graph over weights that exceed the second-level cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quantmill_triton import launch
from quantmill_triton.available import gluon_known
from quantmill_triton.configs import Config, shared_bytes, split_of
from quantmill_triton.facts import Facts
from quantmill_triton.launch import Weight
from quantmill_triton.layout import _lookup
from quantmill_triton.packing import words_shape

KINDS = {
    # bits, group, values, scales, offset, middle, paired
    "int4": (4, 128, 0, 1, 1, 0, 0),
    "int4none": (4, 128, 0, 1, 0, 0, 0),
    "int2": (2, 64, 0, 1, 1, 0, 0),
    "int8": (8, 0, 0, 0, 0, 128, 0),
    "int8g128": (8, 128, 0, 1, 1, 0, 0),
    "nf4": (4, 64, 1, 0, 0, 0, 1),
    "fp8": (8, 0, 2, 0, 0, 0, 0),
}


def facts_of(kind: str, rows: int, columns: int, width: int) -> Facts:
    bits, group, values, scales, offset, middle, paired = KINDS[kind]
    groups = columns // group if group else 1
    return Facts(
        rows, columns, bits, 0, width, 16 // bits, group, 1, groups, rows, values, scales, offset,
        middle, paired, 0,
    )  # fmt: skip


def weight_of(facts: Facts, seed: int = 0) -> Weight:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = words_shape(facts, facts.bits)
    codes = torch.randint(
        -32768, 32768, shape, dtype=torch.int16, device="cuda", generator=generator
    )
    if facts.values >= 2:  # no NaN or infinity among 8-bit floats
        codes &= 0x3F3F
    scale = torch.rand((facts.groups, facts.rows), device="cuda", generator=generator) + 0.5
    if facts.offset == 1:
        half = scale.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
        zeros = torch.randint(0, 16, half.shape, device="cuda", generator=generator)
        scale = half | (zeros.to(torch.int32) << 16)
    elif facts.scales == 1:
        scale = scale.to(torch.bfloat16)
    table = lut = unit = None
    if facts.values == 1:
        table = torch.linspace(-1, 1, 16, device="cuda") ** 3
        lut, unit = _lookup(table)
    return Weight(codes, None, scale, None, table, lut, unit, None)


def graph_time(calls: list[Any], replays: int = 9) -> float:
    """Microseconds of one call, as the median over replays of a graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[3:])


def warm(tasks: list[tuple[str, int, Config, str]]) -> list[str]:
    """Compile candidates into Triton's cache, on a small weight of the same kind."""
    failed = []
    for kind, width, config, dtype in tasks:
        facts = facts_of(kind, 512, 1024, width)
        x = torch.randn((16, 1024), device="cuda", dtype=getattr(torch, dtype))
        for split in (1, 2):
            parts = (split, -(-facts.chunks // split))
            try:
                launch.matmul_fused(x, weight_of(facts), None, facts, 1.0, config, parts)
            except Exception as error:  # noqa: BLE001 a candidate that fails is one less
                failed.append(f"{kind} {width} {config}: {type(error).__name__} {str(error)[:150]}")
    torch.cuda.synchronize()
    return failed


def candidates(kind: str, rows: int, early: list[int]) -> list[Config]:
    """Tiles by rows of activations, of the weight, warps, resident programs, teams; stages; bytes
    fetched early."""
    if rows <= 4:
        tiles = [(8, 32, 4, 2, 4), (8, 16, 4, 3, 4), (8, 64, 4, 1, 4), (8, 32, 8, 1, 8)]
        tiles += [(8, 128, 4, 2, 1), (8, 128, 8, 2, 1), (8, 64, 4, 4, 1)]
    elif rows <= 8:
        tiles = [(8, 32, 4, 2, 4), (8, 128, 4, 2, 1), (8, 256, 8, 1, 1)]
    elif rows <= 16:
        tiles = [(16, 256, 8, 1, 1), (16, 128, 4, 2, 1), (16, 32, 4, 2, 4), (16, 128, 8, 2, 1)]
        tiles += [(16, 64, 4, 4, 1)]
    elif rows <= 32:
        tiles = [(32, 128, 4, 2, 1), (32, 256, 8, 1, 1), (32, 64, 4, 2, 1)]
    elif rows <= 64:
        tiles = [(64, 64, 4, 2, 1), (64, 128, 4, 2, 1), (64, 128, 8, 1, 1)]
    else:
        tiles = [(128, 128, 8, 1, 1), (128, 64, 4, 2, 1), (128, 256, 8, 1, 1)]
    made = [
        Config(bm, bn, warps, stages, resident, teams, early=ahead)
        for bm, bn, warps, resident, teams in tiles
        for stages in (3, 4)
        for ahead in early
    ]
    if kind == "int4" and gluon_known():
        bm = min(64, max(8, 1 << (rows - 1).bit_length()))
        tiles = [(64, 4, 3, 2), (64, 4, 4, 2), (128, 4, 3, 2), (128, 4, 4, 2)]
        if bm == 32:
            tiles = [(64, 4, 4, 2), (128, 4, 3, 2), (128, 8, 5, 1)]
        elif bm == 64:
            tiles = [(64, 4, 5, 1), (128, 8, 3, 1), (128, 8, 4, 1)]
        made += [
            Config(bm, bn, warps, stages, resident, early=ahead, streamed=True)
            for bn, warps, stages, resident in tiles
            for ahead in early
        ]
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--shapes", nargs="+", default=["8192x8192"])
    parser.add_argument("--kinds", nargs="+", default=["int4"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--early", type=int, nargs="+", default=[-1, 0, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    start = time.perf_counter()
    tasks = sorted(
        {
            (kind, width, config, args.dtype)
            for kind in args.kinds
            for width in args.widths
            for rows in args.rows
            for config in candidates(kind, rows, args.early)
        }
    )
    lots = [tasks[i :: args.jobs] for i in range(args.jobs)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        lots = [lot for lot in lots if lot]
        for failed in pool.map(warm, lots):
            for line in failed:
                print("failed", line[:120])
    print(f"compiled {len(tasks)} candidates in {time.perf_counter() - start:.0f} s", flush=True)

    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for shape in args.shapes:
        out, columns = (int(part) for part in shape.split("x"))
        if not args.no_peer:
            dense = [torch.randn((out, columns), device="cuda").to(dtype) for _ in range(4)]
            for rows in args.rows:
                x = torch.randn((rows, columns), device="cuda").to(dtype)
                calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]
                spent = graph_time(calls * 2)
                print(f"{shape} rows {rows}: cuBLAS {spent:.1f} us", flush=True)
                found.append({"shape": shape, "rows": rows, "kind": "cublas", "us": spent})
            del dense
        for kind in args.kinds:
            for width in args.widths:
                facts = facts_of(kind, out, columns, width)
                first = weight_of(facts)
                size = sum(t.numel() * t.element_size() for t in (first.codes, first.scale))
                weights = [first, *(weight_of(facts, i) for i in range(1, 2 + (300 << 20) // size))]
                full = launch.dequantize(first, facts, 1.0, torch.float32)
                for rows in args.rows:
                    x = torch.randn((rows, columns), device="cuda").to(dtype)
                    expected = x.float() @ full.t()
                    best, most = [], launch._machine(x.device).shared
                    for config in candidates(kind, rows, args.early):
                        if not config.streamed and shared_bytes(config, facts) > most:
                            continue
                        tiles = -(-out // config.bn) * -(-rows // config.bm)
                        chosen = split_of(facts, rows, config, 132)[0]
                        for parts in sorted({chosen, 1, 2, 3, 4, 6, 8}):
                            if parts > 1 and (tiles * parts > 132 * 16 or parts * config.teams > 8):
                                continue
                            part = -(-facts.chunks // parts)
                            split = (-(-facts.chunks // part), part)
                            launch._locks(x.device)._used = 4096 * 4
                            calls = [
                                partial(launch.matmul_fused, x, w, None, facts, 1.0, config, split)
                                for w in weights
                            ]
                            try:
                                result = calls[0]()
                                error = (result.float() - expected).norm() / expected.norm()
                                spent = graph_time(calls, 5)
                            except Exception as problem:  # noqa: BLE001 likewise
                                print("failed", config, str(problem)[:60])
                                break
                            entry = {
                                "shape": shape, "rows": rows, "kind": kind, "width": width,
                                **config._asdict(), "parts": parts, "us": spent,
                                "chosen": chosen, "error": float(error),
                                "tb_s": size / spent / 1e6,
                            }  # fmt: skip
                            best.append(entry)
                            found.append(entry)
                    best.sort(key=lambda entry: entry["us"])
                    for entry in best[:5]:
                        print(
                            f"{shape} rows {rows} {kind} w{width}: {entry['us']:.1f} us"
                            f" {entry['tb_s']:.2f} TB/s err {entry['error']:.1e}"
                            f" bm {entry['bm']} bn {entry['bn']} warps {entry['warps']}"
                            f" stages {entry['stages']} parts {entry['parts']}"
                            f" teams {entry['teams']} chosen {entry['chosen']}"
                            f" early {entry['early']} streamed {entry['streamed']}",
                            flush=True,
                        )
                    wrong = [entry for entry in best if not entry["error"] < 4e-3]
                    if wrong:
                        print(f"WRONG: {len(wrong)} of {len(best)}, e.g. {wrong[0]}")
                del weights, full
        args.out.write_text(json.dumps(found))
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
