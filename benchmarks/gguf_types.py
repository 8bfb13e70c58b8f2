"""ggml's types: decoding and quantizing beside ggml's C functions and gguf-py, in one run.

    python benchmarks/gguf_types.py decode BUILD/bin [--types Q4_K Q6_K] [--json]
    python benchmarks/gguf_types.py encode BUILD/bin [--threads 2] [--size 4096]

``BUILD/bin`` is the folder of llama.cpp's libraries. ``decode`` goes into a float32 output that is
there already, on one thread; the rates are of what is written. ``encode`` quantizes a square
matrix; ggml's function knows no threads, so it gets the rows in pieces. Runs alternate, and the
fastest of each counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interop_llamacpp import Ggml
from torch import Tensor

from quantmill_gguf.encode import MADE, decode, encode
from quantmill_gguf.types import TYPES
from quantmill_gguf.types.sizes import BY_NAME, PLAIN

BLOCKS = [name for name in TYPES if name not in PLAIN]


def fastest(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each, in turn; the first round warms up."""
    found = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if turn:
                found[name] = min(found[name], seconds)
    return found


def real_blocks(name: str, rows: int, columns: int, ggml: Ggml) -> Tensor:
    """What a quantizer makes, where there is one; else random bytes with finite scales."""
    generator = torch.Generator().manual_seed(0)
    if name in MADE:
        return encode(name, torch.randn(rows, columns, generator=generator) * 0.02)
    size = (rows, BY_NAME[name].row_bytes(columns))
    return torch.randint(0, 120, size, dtype=torch.uint8, generator=generator)


def gguf_py(name: str, raw: Tensor) -> Callable[[], object] | None:
    """gguf-py's decoder, where it has one."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, name, None)
    if kind is None or kind not in gguf.quants._type_traits:
        return None
    return lambda: gguf.dequantize(raw.numpy(), kind)


def decoding(ggml: Ggml, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rates of each type."""
    torch.set_num_threads(1)
    rows, columns, found = 2048, 4096, []
    out, other = torch.empty(rows, columns), torch.empty(rows, columns)
    for name in names:
        raw = real_blocks(name, rows, columns, ggml)
        theirs = ggml.decoder(name)
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda raw=raw, name=name: decode(name, raw, out),
            "ggml": lambda raw=raw, theirs=theirs: theirs(
                raw.data_ptr(), other.data_ptr(), other.numel()
            ),
        }
        seconds = fastest(runs, rounds)
        python = gguf_py(name, raw)
        if python is not None:
            seconds |= fastest({"gguf-py": python}, 1)
        assert np.array_equal(out.numpy(), other.numpy(), equal_nan=True)
        rate = {who: out.numel() * 4 / taken / 1e9 for who, taken in seconds.items()}
        row = {"type": name, "GB/s": rate, "ggml": rate["ours"] / rate["ggml"]}
        if python is not None:
            row["gguf-py"] = rate["ours"] / rate["gguf-py"]
        found.append(row)
        words = "  ".join(f"{who} {value:6.2f}" for who, value in rate.items())
        more = f", {row['gguf-py']:6.1f} x gguf-py" if python is not None else ""
        print(f"{name:8} GB/s: {words}   {row['ggml']:.2f} x ggml{more}", flush=True)
    return found


def encoding(
    ggml: Ggml, names: list[str], rounds: int, threads: int, size: int
) -> list[dict[str, Any]]:
    """Seconds for a matrix of each type."""
    torch.set_num_threads(threads)
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02
    importance = torch.rand(size, generator=torch.Generator().manual_seed(1))
    found = []
    with ThreadPoolExecutor(threads) as pool:
        pieces = values.chunk(4 * threads)
        for name in names:
            for weights in (None, importance) if TYPES[name].weighs else (None,):

                def theirs(name: str = name, weights: Tensor | None = weights) -> list[Tensor]:
                    return list(pool.map(lambda part: ggml.encode(name, part, weights), pieces))

                def ours(name: str = name, weights: Tensor | None = weights) -> Tensor:
                    return encode(name, values, weights)

                same = torch.equal(ours(), torch.cat(theirs()))
                seconds = fastest({"ours": ours, "ggml": theirs}, rounds)
                ratio = seconds["ours"] / seconds["ggml"]
                kind = "with importance" if weights is not None else ""
                row = {"type": name, "importance": bool(kind), "seconds": seconds, "ratio": ratio}
                found.append({**row, "same_bytes": same})
                words = "  ".join(f"{who} {value:.3f} s" for who, value in seconds.items())
                differ = "" if same else "  BYTES DIFFER"
                print(f"{name:8} {kind:16} {words}: {ratio:.2f}{differ}", flush=True)
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("what", choices=("decode", "encode"))
    parser.add_argument("bins", type=Path, help="folder of llama.cpp's libraries")
    parser.add_argument("--types", nargs="*", default=BLOCKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    ggml = Ggml(arguments.bins)
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        if arguments.what == "decode":
            found = decoding(ggml, arguments.types, arguments.rounds)
        else:
            names = [name for name in arguments.types if name in MADE]
            found = encoding(ggml, names, arguments.rounds, arguments.threads, arguments.size)
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
