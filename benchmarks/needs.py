"""What `plan` and `choose` say a model needs, beside what it then takes.

    python benchmarks/needs.py WORK [--methods bnb-nf4 hqq-4 ...] [--context 512] [--json]

A process of its own for each method (all installed ones by default) quantizes a fabricated Llama
into a folder, loads the float checkpoint with the method where it can, loads the folder, and runs
`context` tokens and one more through the model. Each time the peak above the start is measured; the
imports and a run of a tiny model came before.

`weights` is what plan says the model holds by what it holds; `loading`, `stored`, `running` and
`quantizing` are the estimated peaks by the measured ones; calibrated methods quantize with 16
windows of 128 tokens. Weights that are mapped from the file count as read, whichever of its pages
the system has in memory. The allocator is told to give freed memory back at once
(`MALLOC_MMAP_THRESHOLD_`): what it keeps for later use is no need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantmill.testing.fabricate import write_tiny_llama

CHILD = r"""
import gc, json, shutil, sys
from pathlib import Path
import torch, quantmill
from quantmill.api import make_job, prepare
from quantmill.fitting import FLOAT
from quantmill.memory import needs
from quantmill.testing.linears import held_bytes
from quantmill.testing.memory import PeakMemory, read_weights
work, method, context = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(2)
name = None if method == FLOAT else method
able = None if name is None else quantmill.default_host().methods[
    quantmill.default_host().presets[name][0].name].capabilities
suffix = ".gguf" if method.startswith("gguf") else ""
found, said = {}, {}

def estimate(key, place, how, count):
    job = make_job(place, how, planning=True)
    wanted = needs(prepare(job, allow_float=True), job.architecture.settings, context=count)
    said[key], said[f"{key} weights"] = wanted.loading, wanted.weights
    said[f"{key} running"] = wanted.running

def forward(model, count):
    ids = torch.arange(count)[None] % 200
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)

def tokens(vocabulary):
    return torch.randint(0, vocabulary, (16, 128), generator=torch.Generator().manual_seed(0))

def go(source, count, vocabulary):
    out = work / f"made-{method}{suffix}"
    gc.collect()
    if name is not None:
        rows = tokens(vocabulary)
        data = {}
        if able.calibrated:
            data = {"calibration": rows, "samples": rows.shape[0], "length": rows.shape[1]}
        with PeakMemory() as peak:
            report = quantmill.quantize(source, out, name, **data)
        found["quantizing"] = peak.bytes
        said["quantizing"] = report.plan.totals["quantizing_bytes"]
        del report
    ways = {"loading": (source, name)} if name is None or able.on_the_fly else {}
    ways |= {"stored": (out, None)} if name is not None else {}
    for key, (place, how) in ways.items():
        gc.collect()
        with PeakMemory() as peak:
            model = quantmill.load(place, how)
        estimate(key, place, how, count)
        found[key] = peak.bytes + read_weights(model)
        found[f"{key} weights"] = held_bytes(model)
        base = peak.start
        with PeakMemory() as peak:
            forward(model, count)
        found[f"{key} running"] = peak.bytes + peak.start - base
        del model
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)

go(work / "tiny", 8, 256)
go(work / "model", context, 4096)
print(json.dumps({"found": found, "said": said}))
"""


def fabricate(work: Path) -> None:
    """Random Llamas: of 53 million weights, and a tiny one of the same kind."""
    for name, sizes in {
        "tiny": {"hidden": 256, "inner": 512, "layers": 1, "vocab": 256, "heads": 4},
        "model": {"hidden": 1024, "inner": 2816, "layers": 4, "vocab": 4096, "heads": 16},
    }.items():
        if not (work / name / "config.json").exists():
            write_tiny_llama(work / name, **sizes)


def measure(work: Path, method: str, context: int) -> dict[str, Any]:
    """A method's estimates by what was measured, and both in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(work), method, str(context)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)},
    )
    if done.returncode:
        return {"method": method, "error": done.stderr.strip()[-1000:]}
    given = json.loads(done.stdout.splitlines()[-1])
    found, said = given["found"], given["said"]
    return {
        "method": method,
        **{key: value / found[key] for key, value in said.items()},
        "bytes": {key: [value, found[key]] for key, value in said.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from quantmill.host import default_host

    work = options.work.absolute()
    fabricate(work)
    rows = []
    for method in options.methods or ["float", *default_host().presets]:
        row = measure(work, method, options.context)
        rows.append(row)
        if not options.json:
            print(f"{method:20}", row.get("error", ""), end="")
            for key, (said, found) in row.get("bytes", {}).items():
                print(f"  {key} {said >> 20}/{found >> 20} {said / found:.2f}", end="")
            print(flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
