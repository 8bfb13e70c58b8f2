"""Planning a Llama 3.1 of 405B or 70B from its headers: wall time and peak above the imports.

    python benchmarks/plan.py [--model 405b] [--method bnb-nf4] [--rounds 3] [--profile] [--json]

The checkpoint is fabricated: the real names, shapes, shards and index, in sparse files that hold
headers and no weights. Each plan runs in a process of its own; time and peak count from after the
imports of torch, transformers and quantmill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantmill.testing.fabricate import llama_config, llama_shapes

MODELS: dict[str, dict[str, int]] = {
    "405b": {"hidden": 16384, "inner": 53248, "layers": 126, "heads": 128},
    "70b": {"hidden": 8192, "inner": 28672, "layers": 80, "heads": 64},
}
SHARDS = {"405b": 191, "70b": 30}
"""As they are published."""
SECONDS, PEAK_BYTES = 5.0, 100 * 10**6
"""Targets."""

CHILD = r"""
import cProfile, importlib.util, io, json, pstats, sys, time
folder, method, profiled = sys.argv[1], sys.argv[2], sys.argv[3] == "profile"
import torch, pydantic
import quantmill.api, quantmill.checkpoint.reader, quantmill.kernels, quantmill.linear
import quantmill.stages.select, quantmill.stages.target, quantmill.stages.validate
def here(name):
    return importlib.util.find_spec(name) is not None
if here("transformers"):
    import transformers, transformers.models.llama.modeling_llama
if here("quantmill_transformers"):
    import quantmill_transformers.architecture
if here("bitsandbytes"):
    import bitsandbytes
if here("quantmill_bnb"):
    import quantmill_bnb.linear, quantmill_bnb.quantizer, quantmill_bnb.validate
import quantmill
from quantmill.testing.memory import PeakMemory
quantmill.default_host()

profile = cProfile.Profile() if profiled else None
with PeakMemory() as memory:
    start = time.perf_counter()
    if profile is not None:
        profile.enable()
    plan = quantmill.plan(folder, method)
    seconds = time.perf_counter() - start
text = ""
if profile is not None:
    profile.disable()
    stream = io.StringIO()
    pstats.Stats(profile, stream=stream).sort_stats("cumulative").print_stats(40)
    text = stream.getvalue()
start = time.perf_counter()
totals = plan.totals
print(json.dumps({"seconds": seconds, "peak": memory.bytes,
                  "totals_seconds": time.perf_counter() - start,
                  "totals": totals, "modules": len(plan.modules), "profile": text,
                  "errors": [str(item) for item in plan.findings.errors]}))
"""


def config_of(name: str) -> dict[str, Any]:
    """``config.json`` of Llama 3.1, as far as shapes go."""
    config = llama_config(**MODELS[name], vocab=128256, dtype="bfloat16")
    return config | {"num_key_value_heads": 8, "max_position_embeddings": 131072}


def parameters(config: dict[str, Any]) -> int:
    """Parameters of a Llama with an untied head, by formula."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * hidden * hidden + 2 * key * hidden + 3 * inner * hidden + 2 * hidden
    return int(2 * config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden)


def fabricate(folder: Path, name: str) -> Path:
    """Write config, index and sparse shards: true headers, no weights."""
    config, shards = config_of(name), SHARDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    shapes = list(llama_shapes(config).items())
    weight_map = {}
    total = 0
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        stop = 0
        for tensor, shape in shapes[
            index * len(shapes) // shards : (index + 1) * len(shapes) // shards
        ]:
            start, stop = stop, stop + 2 * _count(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
            weight_map[tensor] = file
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + stop)
        total += stop
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def measure(folder: Path, method: str, *, profiled: bool = False) -> dict[str, Any]:
    """Plan once in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), method, "profile" if profiled else "plain"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="405b")
    parser.add_argument("--method", default="bnb-nf4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = fabricate(Path(work) / "llama", options.model)
        runs = [measure(folder, options.method) for _ in range(options.rounds)]
        profile = measure(folder, options.method, profiled=True) if options.profile else None
    seconds = [run["seconds"] for run in runs]
    report = {
        "model": options.model,
        "method": options.method,
        "parameters": runs[0]["totals"]["parameters"],
        "expected_parameters": parameters(config_of(options.model)),
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "peak": max(run["peak"] for run in runs),
        "totals_seconds": statistics.median(run["totals_seconds"] for run in runs),
        "targets": {"seconds": SECONDS, "peak": PEAK_BYTES},
        "totals": runs[0]["totals"],
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{'what':12} {'measured':>18} {'target':>12} {'ratio':>6}")
    print(
        f"{'wall time':12} {report['seconds']:16.2f} s {SECONDS:10.1f} s"
        f" {report['seconds'] / SECONDS:6.2f}"
    )
    print(
        f"{'peak memory':12} {report['peak'] / 1e6:15.1f} MB {PEAK_BYTES / 1e6:9.1f} MB"
        f" {report['peak'] / PEAK_BYTES:6.2f}"
    )
    print(f"{report['parameters']:,} parameters, {report['expected_parameters']:,} by formula")
    if profile is not None:
        print(profile["profile"])


if __name__ == "__main__":
    main()
