"""Loading, beside transformers: wall time, peak memory above imports, ratios.

    python benchmarks/load.py WORK_FOLDER [--peer] [--rounds 3] [--device cuda] [--json]

Each load runs in a process of its own, in turn. Time and peak count from after the imports. On
CUDA the peak is what torch's allocator held at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from fabricate import fabricate

CHILD = r"""
import json, sys, time
kind, folder, method, device = sys.argv[1:5]
import torch, transformers
import bitsandbytes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import quantmill, quantmill.api
import quantmill.checkpoint.reader, quantmill.stages.quantize, quantmill.stages.replace
import quantmill_bnb.linear, quantmill_bnb.quantizer, quantmill_transformers.architecture
import transformers.models.llama.modeling_llama
from quantmill.testing.memory import PeakMemory
torch.set_num_threads(2)
if device == "cuda":
    torch.zeros(1, device="cuda")

with PeakMemory() as memory:
    start = time.perf_counter()
    if kind == "quantmill":
        model = quantmill.load(folder, None if method == "stored" else method, device=device)
    else:
        options = {}
        if method == "bnb-nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        elif method == "bnb-int8":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        if device == "cuda":
            options["device_map"] = {"": 0}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
tensors = {t.data_ptr(): t for t in model.state_dict().values()}
size = sum(t.numel() * t.element_size() for t in tensors.values())
top = torch.cuda.max_memory_allocated() if device == "cuda" else memory.bytes
print(json.dumps({"seconds": seconds, "peak": top, "anonymous": memory.anonymous, "model": size}))
"""


def measure(kind: str, folder: Path, method: str, device: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(folder), method, device],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", action="store_true", help="also run transformers (minutes)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--what", nargs="*", choices=["bnb-nf4", "bnb-int8", "stored"],
        default=["bnb-nf4", "bnb-int8", "stored"],
    )  # fmt: skip
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    source = options.work / "llama-1.1b"
    if options.what:
        fabricate(source, "1.1b")
    stored = options.work / "llama-1.1b-nf4"
    if "stored" in options.what and not stored.exists():
        import quantmill

        quantmill.quantize(source, stored, "bnb-nf4")
    largest = 32000 * 2048 * 2  # the embedding
    rows: list[dict[str, Any]] = []
    for method in options.what:
        folder = stored if method == "stored" else source
        kinds = ["quantmill", "transformers"] if options.peer else ["quantmill"]
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind in kinds:
                run = measure(kind, folder, method, options.device)
                runs[kind].append(run)
                print(f"{kind} {method}: {run['seconds']:.2f} s", file=sys.stderr, flush=True)
        for kind in kinds:
            seconds = [run["seconds"] for run in runs[kind]]
            rows.append(
                {
                    "what": method,
                    "who": kind,
                    "seconds": statistics.median(seconds),
                    "spread": [min(seconds), max(seconds)],
                    "model": runs[kind][0]["model"],
                    "peak": statistics.median(run["peak"] for run in runs[kind]),
                    "anonymous": statistics.median(run["anonymous"] for run in runs[kind]),
                }
            )
        if options.peer:
            rows[-2]["ratio"] = rows[-2]["seconds"] / rows[-1]["seconds"]
    curve = []
    for layers in options.layers:
        folder = fabricate(options.work / f"layers-{layers}", "252m", layers)
        run = measure("quantmill", folder, "bnb-nf4", options.device)
        curve.append({"layers": layers, "beyond_model": run["peak"] - run["model"], **run})
    if options.json:
        print(json.dumps({"loads": rows, "layers": curve}, indent=2))
        return
    for row in rows:
        bound, words = 1.15 * row["model"] + (64 << 20), "1.15 x model + 64 MiB"
        if options.device == "cuda":
            bound, words = row["model"] + 2 * largest + (256 << 20), "model + 2 largest + 256 MiB"
        print(
            f"{row['what']:9} {row['who']:13} {row['seconds']:7.2f} s"
            f" [{row['spread'][0]:.2f}, {row['spread'][1]:.2f}]"
            f"  model {row['model'] / 2**20:7.0f} MiB  peak {row['peak'] / 2**20:7.0f} MiB"
            f"  ({row['peak'] / bound:.2f} of {words})"
        )
    for method in options.what:
        for row in rows:
            if row["what"] == method and "ratio" in row:
                print(f"{method}: quantmill / transformers = {row['ratio']:.3f}")
    for item in curve:
        beyond = item["beyond_model"] / 2**20
        print(f"{item['layers']:3} layers: peak beyond the model {beyond:.0f} MiB")


if __name__ == "__main__":
    main()
