"""Loading GGUF files, beside transformers: wall time, peak memory above the imports, decoding.

    python benchmarks/gguf_load.py WORK_FOLDER [--types q4_k_m bf16] [--peer] [--experts]
        [--dtypes float32 bfloat16] [--llama BUILD/bin] [--json]

Files of a model of 252 million weights are made first, each load runs in a process of its own. The
bound that is printed is 1.2 times the file and 64 MiB; it holds for the load and, as a peak of its
own, for a prompt of 32 tokens and 24 more that are decoded after it, one by one. Their rate is that
of the lower quartile of their times. ``--dtypes`` are those that we compute in, float32 unless
another one is asked for. ``--experts`` loads a mixture of experts as well, ``--llama`` decodes the
same files with llama.cpp's benchmark program.
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
import json, os, sys, time
who, path, dtype = sys.argv[1:4]
import torch, transformers
from quantmill.testing.memory import PeakMemory
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama, transformers.models.qwen3_moe.modeling_qwen3_moe
if who == "quantmill":
    import quantmill, quantmill.api, quantmill.loading
    import quantmill.stages.quantize, quantmill.stages.replace
    import quantmill_gguf.codec, quantmill_gguf.reader, quantmill_gguf.quantizer
    import quantmill_transformers.architecture
else:
    import gguf, transformers.modeling_gguf_pytorch_utils

with PeakMemory() as memory:
    start = time.perf_counter()
    if who == "quantmill":
        model = quantmill.load(path, dtype=dtype)
    else:
        folder, name = os.path.split(path)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    seconds = time.perf_counter() - start
ids = torch.arange(3, 35).view(1, -1)
with PeakMemory() as running:
    start = time.perf_counter()
    with torch.inference_mode():
        cache = transformers.DynamicCache(config=model.config)
        found = model(input_ids=ids, past_key_values=cache).logits
        first = time.perf_counter() - start
        times = []
        for _ in range(24):
            token = found[:, -1:].argmax(-1)
            start = time.perf_counter()
            found = model(input_ids=token, past_key_values=cache).logits
            times.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds, "peak": memory.bytes, "first_forward": first,
                  "peak_forward": max(memory.bytes, running.bytes + memory.left),
                  "rate": 1 / sorted(times)[6]}))
"""


def measure(who: str, path: Path, dtype: str) -> dict[str, Any]:
    """One load in a process of its own."""
    command = [sys.executable, "-c", CHILD, who, str(path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's binaries")
    options = parser.parse_args()

    def say(words: str) -> None:
        print(words, file=sys.stderr if options.json else sys.stdout, flush=True)

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
        bound = 1.2 * size + (64 << 20)
        contenders = [("quantmill", dtype) for dtype in options.dtypes]
        contenders += [("transformers", "float32")] if options.peer else []
        medians: dict[str, float] = {}
        for who, dtype in contenders:
            runs = [measure(who, path, dtype) for _ in range(options.rounds)]
            seconds = statistics.median(run["seconds"] for run in runs)
            medians.setdefault(who, seconds)
            row = {
                "file": path.name,
                "who": who,
                "dtype": dtype,
                "seconds": seconds,
                "spread": [function(run["seconds"] for run in runs) for function in (min, max)],
                "peak": max(run["peak"] for run in runs),
                "peak_forward": max(run["peak_forward"] for run in runs),
                "first_forward": statistics.median(run["first_forward"] for run in runs),
                "rate": max(run["rate"] for run in runs),
            }
            if who == "quantmill":
                row["of_bound"] = row["peak"] / bound
                row["forward_of_bound"] = row["peak_forward"] / bound
            rows.append(row)
            say(
                f"{path.name} {size / 2**20:.0f} MiB {who:12} {dtype:8} {seconds:6.2f} s,"
                f" peak {row['peak'] / 2**20:.0f} MiB ({row['peak'] / bound:.2f} of 1.2 x file"
                f" + 64 MiB), first forward {row['first_forward']:.2f} s, peak then"
                f" {row['peak_forward'] / 2**20:.0f} MiB ({row['peak_forward'] / bound:.2f}),"
                f" then {row['rate']:.1f} tokens/s",
            )
        if options.peer:
            ratio = medians["quantmill"] / medians["transformers"]
            rows[-2]["ratio"] = ratio
            say(f"{path.name}: quantmill / transformers = {ratio:.3f}")
        if options.llama is not None:
            rate = llama_rate(options.llama, path)
            rows.append({"file": path.name, "who": "llama.cpp", "rate": rate})
            say(f"{path.name}: llama.cpp decodes {rate:.1f} tokens/s")
    if options.json:
        print(json.dumps(rows, indent=2))


def llama_rate(bins: Path, file: Path) -> float:
    """Tokens a second of llama-bench with as many threads as PyTorch has."""
    import torch

    asked = [bins / "llama-bench", "-m", file, "-p", 0, "-n", 24, "-t", torch.get_num_threads()]
    command = [*map(str, asked), "-r", "3", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 24e9 / min(json.loads(done.stdout)[0]["samples_ns"])


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
