"""Peak memory of a calibrated run, by the number of layers.

    python benchmarks/calibration_memory.py WORK [--layers 4 8 16 32] [--method gptq-4] [--json]

Each run is a process of its own; its peak RSS is taken above what it has after a run of one layer,
which brings the imports, the modules outside the blocks and the data. The model is a Llama of
random weights and 6.1 MiB a layer, the data 16 windows of 256 random tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantmill.testing.fabricate import llama_config, llama_shapes

RUN = r"""
import shutil, sys, torch
import quantmill
small, source, out, method = sys.argv[1:]
torch.set_num_threads(2)

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024

def run(source):
    tokens = torch.randint(0, 4096, (16, 256), generator=torch.Generator().manual_seed(0))
    shutil.rmtree(out, ignore_errors=True)
    quantmill.quantize(source, out, method, calibration=tokens)

run(small)
before = memory("VmHWM")
run(source)
print("MIB", before, memory("VmHWM"))
"""


def fabricate(folder: Path, layers: int) -> Path:
    """The checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    config = llama_config(hidden=512, inner=1408, layers=layers, vocab=4096, heads=8)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in llama_shapes(config).items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--method", default="gptq-4")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    small = fabricate(options.work / "1", 1)
    for layers in options.layers:
        source = fabricate(options.work / str(layers), layers)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2**20
        command = [sys.executable, "-c", RUN, str(small), str(source), str(options.work / "out")]
        done = subprocess.run(
            [*command, options.method], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        line = next(line for line in done.stdout.splitlines() if line.startswith("MIB"))
        before, peak = map(float, line.split()[1:])
        shutil.rmtree(options.work / "out", ignore_errors=True)
        row = {"method": options.method, "layers": layers, "weights": round(size * 2**20)}
        rows.append({**row, "peak": peak * 2**20, "above": (peak - before) * 2**20})
        print(
            f"{options.method:8} {layers:3} layers, {size:5.0f} MiB of weights:"
            f" peak {peak:5.0f} MiB, {peak - before:4.0f} above one layer's",
            file=sys.stderr if options.json else sys.stdout,
            flush=True,
        )
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
