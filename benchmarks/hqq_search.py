"""The half-quadratic search beside hqq's: what it minimises, and how long it takes.

    python benchmarks/hqq_search.py [--bits 2 3 4 8] [--axis 0 1] [--rows 4096] [--layers NAME]

Both take the same bfloat16 weights ``[rows, 4096]`` to packed codes, in turns, on the threads of
the process (``OMP_NUM_THREADS``, else 2). The objective is the one of the method, the mean of
``|w - s * (q - z)| ** 0.7``, of what each stores: scales and zero points in bfloat16, as
transformers has them (``exact``: the library's in float32, before it rounds them). The best time of
the repeats counts. Layers: normal, with heavy tails (Student's t, 4 degrees of freedom, another
scale for every column), and the weights of ``models/novella`` laid one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target
from quantmill_hqq.config import HqqConfig
from quantmill_hqq.quantizer import HqqQuantizer

COLUMNS = 4096
NORM = 0.7


def layers(rows: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, COLUMNS, generator=made)
    normals = torch.randn(5, rows, COLUMNS, generator=made)
    heavy = normals[0] / normals[1:].square().mean(0).sqrt()
    spread = torch.rand(COLUMNS, generator=made).mul(2).sub(1).exp()
    found = []
    folder = Path(__file__).parent.parent / "models" / "novella"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += [
                file.get_tensor(name).float().reshape(-1)
                for name in file.keys()  # noqa: SIM118 the file is not iterable
                if "proj" in name
            ]
    flat = torch.cat(found)
    real = flat[: min(rows, flat.numel() // COLUMNS) * COLUMNS].reshape(-1, COLUMNS)
    all_of = {"normal": normal * 0.02, "heavy tails": heavy * spread * 0.02, "novella": real}
    return {name: weight.to(torch.bfloat16) for name, weight in all_of.items()}


def ours(weight: Tensor, bits: int, axis: int) -> tuple[float, Tensor]:
    config = HqqConfig(nbits=bits, axis=axis, group_size=64)  # type: ignore[arg-type]
    quantizer = HqqQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))
    target, source = make_target(*weight.shape), MatrixSource(weight, rows=128)
    start = time.perf_counter()
    form = quantizer.quantize(target, source)
    return time.perf_counter() - start, form.dequantize(torch.float32)


def theirs(weight: Tensor, bits: int, axis: int) -> tuple[float, Tensor, Tensor]:
    from hqq.core.quantize import Quantizer

    start = time.perf_counter()
    codes, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=64,
        round_zero=bits == 4,
        axis=axis,
        compute_dtype=torch.bfloat16,
        device="cpu",
    )
    seconds = time.perf_counter() - start
    plain = Quantizer.unpack[meta["packing"]](codes, dtype=torch.float32)
    shape = (-1, 64) if axis == 1 else (64, -1)
    plain = plain[: weight.numel() // 64] if axis == 1 else plain[:64]
    plain = plain.reshape(shape)
    scale, zero = meta["scale"], meta["zero"]
    exact = ((plain - zero) * scale).reshape(weight.shape)
    scale, zero = (part.to(torch.bfloat16).float() for part in (scale, zero))
    return seconds, ((plain - zero) * scale).reshape(weight.shape), exact


def objective(weight: Tensor, made: Tensor, norm: float = NORM) -> float:
    return float((weight.float() - made).abs().pow(norm).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 8])
    parser.add_argument("--axis", type=int, nargs="*", default=[1, 0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", nargs="*", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    results: list[dict[str, Any]] = []
    for name, weight in layers(options.rows).items():
        if options.layers and name not in options.layers:
            continue
        for bits in options.bits:
            for axis in options.axis:
                runs = [
                    (ours(weight, bits, axis), theirs(weight, bits, axis))
                    for _ in range(options.repeats)
                ]
                made, (_, peer, exact) = runs[0][0][1], runs[0][1]
                first = min(run[0][0] for run in runs)
                second = min(run[1][0] for run in runs)
                row = {
                    "layer": name,
                    "bits": bits,
                    "axis": axis,
                    "seconds": first,
                    "peer_seconds": second,
                    "time_ratio": first / second,
                    "objective_ratio": objective(weight, made) / objective(weight, peer),
                    "of_exact": objective(weight, made) / objective(weight, exact),
                    "l2_ratio": objective(weight, made, 2) / objective(weight, peer, 2),
                }
                results.append(row)
                if not options.json:
                    print(
                        f"{name:12} {bits} bits axis {axis}: {first:6.2f} s of {second:6.2f} s,"
                        f" ratio {row['time_ratio']:.3f}; objective {row['objective_ratio']:.4f}"
                        f" (of exact {row['of_exact']:.4f}; l2 {row['l2_ratio']:.4f})",
                        flush=True,
                    )
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
