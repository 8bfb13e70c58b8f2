"""Loading GGUF files, beside transformers: wall time and peak memory above the imports.

    python benchmarks/gguf_load.py WORK_FOLDER [--types q4_k_m bf16] [--peer] [--experts]
        [--json]

Files of a model of 252 million weights are made first, each load runs in a process of its own. The
bound that is printed is 1.2 times the file and 64 MiB. ``--experts`` loads a mixture of experts as
well.
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
import json, os, sys, threading, time
who, path = sys.argv[1:3]
import torch, transformers
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama, transformers.models.qwen3_moe.modeling_qwen3_moe
if who == "quantmill":
    import quantmill, quantmill.api, quantmill.loading
    import quantmill.stages.quantize, quantmill.stages.replace
    import quantmill_gguf.codec, quantmill_gguf.reader, quantmill_gguf.quantizer
    import quantmill_transformers.architecture
else:
    import gguf, transformers.modeling_gguf_pytorch_utils

def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

base, peak, stop = rss(), [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], rss())
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
if who == "quantmill":
    model = quantmill.load(path)
else:
    folder, name = os.path.split(path)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
seconds = time.perf_counter() - start
ids = torch.arange(3, 35).view(1, -1)
peak[0] = max(peak[0], rss())
loaded = peak[0] - base
start = time.perf_counter()
with torch.inference_mode():
    model(input_ids=ids)
first = time.perf_counter() - start
stop.set()
print(json.dumps({"seconds": seconds, "peak": loaded, "first_forward": first,
                  "peak_forward": max(peak[0], rss()) - base}))
"""


def measure(who: str, path: Path) -> dict[str, Any]:
    """One load in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, who, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """The command line."""
    import quantmill

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--types", nargs="*", default=["q4_k_m", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also run transformers")
    parser.add_argument("--experts", action="store_true", help="also a mixture of experts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    files = []
    source = fabricate(options.work / "252m", "252m")
    for kind in options.types:
        path = options.work / f"252m-{kind}.gguf"
        if not path.exists():
            quantmill.quantize(source, path, f"gguf-{kind}")
        files.append(path)
    if options.experts:
        path = options.work / "experts-q8_0.gguf"
        if not path.exists():
            quantmill.quantize(mixture(options.work / "experts"), path, "gguf-q8_0")
        files.append(path)
    for path in files:
        size = path.stat().st_size
        medians = {}
        for who in ["quantmill", "transformers"] if options.peer else ["quantmill"]:
            runs = [measure(who, path) for _ in range(options.rounds)]
            seconds = medians[who] = statistics.median(run["seconds"] for run in runs)
            peak = max(run["peak"] for run in runs)
            forward = max(run["peak_forward"] for run in runs)
            first = statistics.median(run["first_forward"] for run in runs)
            bound = 1.2 * size + (64 << 20)
            spread = [function(run["seconds"] for run in runs) for function in (min, max)]
            row = {"file": path.name, "who": who, "seconds": seconds, "spread": spread}
            rows.append({**row, "peak": peak, "peak_forward": forward, "first_forward": first})
            if who == "quantmill":
                rows[-1]["of_bound"] = peak / bound
            print(
                f"{path.name} {size / 2**20:.0f} MiB {who:12} {seconds:6.2f} s,"
                f" peak {peak / 2**20:.0f} MiB ({peak / bound:.2f} of 1.2 x file + 64 MiB),"
                f" first forward {first:.2f} s,"
                f" peak then {forward / 2**20:.0f} MiB",
                file=sys.stderr if options.json else sys.stdout,
                flush=True,
            )
        if len(medians) == 2:
            ratio = medians["quantmill"] / medians["transformers"]
            rows[-2]["ratio"] = ratio
            if not options.json:
                print(f"{path.name}: quantmill / transformers = {ratio:.3f}")
    if options.json:
        print(json.dumps(rows, indent=2))


def mixture(folder: Path) -> Path:
    """A Qwen3-MoE of 32 experts, some 300 million weights."""
    import torch
    import transformers

    if not (folder / "config.json").exists():
        config = transformers.Qwen3MoeConfig(
            vocab_size=8192,
            hidden_size=512,
            head_dim=64,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_hidden_layers=8,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        )
        torch.manual_seed(0)
        transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
