"""What `plan` and `choose` say a model needs, beside what it then takes.

    python benchmarks/needs.py WORK [--methods bnb-nf4 hqq-4 ...] [--context 512] [--json]

For each method (all installed ones by default) a process quantizes a fabricated Llama into a
folder. Others load the float checkpoint with the method where it can, and the folder, and run
`context` tokens and one more through the model, or train adapters of rank 16 on it for two steps.
Each time the peak above the start is measured. The imports and a run of one block of the same
widths came before: what a process keeps for good after its first training (some 12 MiB of its heap
and of PyTorch's libraries) is no need of the model.

`weights` is what plan says the model holds by what it holds; `loading`, `stored`, `running`,
`training` and `quantizing` are the estimated peaks by the measured ones; calibrated methods
quantize with 16 windows of 128 tokens. Weights that are mapped from the file count as read,
whichever of its pages the system has in memory. The allocator is told to give freed memory back at
once (`MALLOC_MMAP_THRESHOLD_`): what it keeps for later use is no need.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantmill.host import default_host
from quantmill.testing.fabricate import write_tiny_llama

CHILD = r"""
import gc, json, sys
from pathlib import Path
import torch, quantmill
from quantmill.api import make_job, prepare
from quantmill.fitting import FLOAT
from quantmill.heap import give_back
from quantmill.memory import needs
from quantmill.testing.linears import held_bytes
from quantmill.testing.memory import PeakMemory, read_weights
work, method, context, parts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(2)
name = None if method == FLOAT else method
able = None if name is None else quantmill.default_host().methods[
    quantmill.default_host().presets[name][0].name].capabilities
suffix = ".gguf" if method.startswith("gguf") else ""
found, said = {}, {}

def estimate(place, how, count, training):
    job = make_job(place, how, planning=True)
    plan = prepare(job, allow_float=True)
    return needs(plan, job.architecture.settings, context=count, training=training)

def forward(model, count):
    ids = torch.arange(count)[None] % 200
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)

MODULES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]

def train(model, count):
    import peft
    from quantmill_transformers.lora import lora_config
    config = peft.LoraConfig(r=16, target_modules=MODULES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora_config(config))
    weights = [p for p in model.parameters() if p.requires_grad]
    for p in weights:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(weights)
    ids = torch.arange(count)[None] % 200
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

def quantize(source, out, vocabulary):
    data = {}
    if able.calibrated:
        rows = torch.randint(0, vocabulary, (16, 128), generator=torch.Generator().manual_seed(0))
        data = {"calibration": rows, "samples": rows.shape[0], "length": rows.shape[1]}
    with PeakMemory() as peak:
        report = quantmill.quantize(source, out, name, **data)
    found["quantizing"], said["quantizing"] = peak.bytes, report.plan.totals["quantizing_bytes"]

def use(key, place, how, count, training):
    gc.collect()
    give_back()
    with PeakMemory() as peak:
        model = quantmill.load(place, how, training=training)
    wanted = estimate(place, how, count, training)
    loading, base = peak.bytes + read_weights(model), peak.start
    if not training:
        found[key], said[key] = loading, wanted.loading
        found[f"{key} weights"], said[f"{key} weights"] = held_bytes(model), wanted.weights
    what = f"{key} training" if training else f"{key} running"
    with PeakMemory() as peak:
        (train if training else forward)(model, count)
    found[what], said[what] = peak.bytes + peak.start - base, wanted.running

for model, count, vocabulary in ("block", context, 256), ("model", context, 4096):
    source, out = work / model, work / f"{model}-{method}{suffix}"
    if "q" in parts and name is not None:
        quantize(source, out, vocabulary)
    ways = {"loading": (source, name)} if name is None or able.on_the_fly else {}
    ways |= {"stored": (out, None)} if name is not None else {}
    for key, way in ways.items():
        if "r" in parts:
            use(key, *way, count, False)
        if "t" in parts and (name is None or able.trainable):
            use(key, *way, count, True)
print(json.dumps({"found": found, "said": said}))
"""


def fabricate(work: Path) -> None:
    """Random Llamas: of 53 million weights, and one block of the same widths."""
    for name, sizes in {
        "block": {"hidden": 1024, "inner": 2816, "layers": 1, "vocab": 256, "heads": 16},
        "model": {"hidden": 1024, "inner": 2816, "layers": 4, "vocab": 4096, "heads": 16},
    }.items():
        if not (work / name / "config.json").exists():
            write_tiny_llama(work / name, **sizes)


def measure(work: Path, method: str, context: int, *, training: bool = True) -> dict[str, Any]:
    """A method's estimates by what was measured, and both in bytes.

    Calibrating keeps a heap for as long as its process lives, so quantizing with it has a process
    of its own, and so has training.
    """
    found: dict[str, int] = {}
    said: dict[str, int] = {}
    host = default_host()
    presets = host.presets.get(method)
    calibrated = presets is not None and host.methods[presets[0].name].capabilities.calibrated
    clear(work, method)
    try:
        for parts in (*(("q", "r") if calibrated else ("qr",)), *(("t",) if training else ())):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(work), method, str(context), parts],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)},
            )
            if done.returncode:
                return {"method": method, "error": done.stderr.strip()[-1000:]}
            given = json.loads(done.stdout.splitlines()[-1])
            found |= given["found"]
            said |= given["said"]
    finally:
        clear(work, method)
    return {
        "method": method,
        **{key: value / found[key] for key, value in said.items()},
        "bytes": {key: [value, found[key]] for key, value in said.items()},
    }


def clear(work: Path, method: str) -> None:
    """Remove what was made with a method, also by a run that was stopped."""
    for path in work.glob(f"*-{method}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
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
