"""Calibrated quantization beside GPTQModel: KL divergence, time, on the same windows.

    python benchmarks/calibrated.py WORK [--peer-python PYTHON] [--python PYTHON] [--only NAME ...]

Both quantize the same model with the same calibration tokens, and we load and judge both files:
mean KL per token to the float model over held-out windows, and the paired difference per window.
``--wide 2`` times both on two random blocks of width 2048 instead, where start-up weighs little.
Each run is a process of its own, the peer's with the interpreter of an environment that has it.
``--python`` names one that has quantmill and what it needs only: transformers imports whatever
quantizer it finds, so an environment with all of them starts slower.
Times are from the start of the process until its files are written, and beside it without start-up:
imports, reading the config, building the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fabricate import fabricate
from safetensors.torch import save_file
from torch import Tensor

import quantmill

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "novella"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "4-bit g128 sym": ("gptq-4", {"bits": 4, "group_size": 128, "sym": True}),
    "4-bit g32 asym act-order": (
        "gptq-4:group_size=32,sym=false,desc_act=true",
        {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "act_group_aware": False},
    ),
    "3-bit g128": ("gptq-3", {"bits": 3, "group_size": 128, "sym": True}),
    "2-bit g64": ("gptq-2:sym=true", {"bits": 2, "group_size": 64, "sym": True}),
    "awq g128 sym": (
        "awq-4-sym",
        {"bits": 4, "group_size": 128, "sym": True, "quant_method": "awq", "format": "gemm"},
    ),
    "awq g128 asym": ("awq-4", {}),
}
OURS = r"""
import sys, time, torch
torch.set_num_threads(2)
import quantmill
from quantmill.calibration.block import Block
from quantmill.calibration.engine import Run
from quantmill.calibration.moments import Moments
from safetensors.torch import load_file
source, out, method, tokens = sys.argv[1:5]
spent, begun = dict.fromkeys(("blocks", "moments", "choosing"), 0.0), []

def timed(owner, name, stage):
    function = getattr(owner, name)
    def run(*arguments, **options):
        start = time.time()
        begun.append(start)
        try:
            return function(*arguments, **options)
        finally:
            spent[stage] += time.time() - start
    setattr(owner, name, run)

timed(Run, "_block", "blocks")
for name in ("add", "join"):
    timed(Moments, name, "moments")
for name in ("make", "spread"):
    timed(Block, name, "choosing")
rows = load_file(tokens)["input_ids"]
quantmill.quantize(source, out, method, calibration=rows, samples=len(rows))
print("TIMES", begun[0], time.time(), *spent.values())
"""
PEER = r"""
import json, sys, time, torch
torch.set_num_threads(2)
source, out, arguments, tokens = sys.argv[1:5]
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
rows = load_file(tokens)["input_ids"].tolist()
model = GPTQModel.load(source, QuantizeConfig(**json.loads(arguments)), device="cpu",
                       dtype=torch.bfloat16)
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
start = time.time()
model.quantize(data, batch_size=8)
model.save(out)
print("TIMES", start, time.time())
"""


def windows(count: int, length: int, name: str) -> Tensor:
    tokenizer = quantmill.load_tokenizer(MODEL)
    text = (MODEL / name).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: ids.numel() // length * length].reshape(-1, length)
    return rows[:count]


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)


def divergences(model: Any, rows: Tensor, reference: list[Tensor]) -> Tensor:
    """Mean KL per token of each window."""
    found = []
    for row, exact in zip(rows, reference, strict=True):
        ours = log_probabilities(model, row.unsqueeze(0))[0]
        found.append((exact.exp() * (exact - ours)).sum(-1).mean())
    return torch.stack(found)


def compared(mine: Tensor, theirs: Tensor) -> dict[str, Any]:
    """The ratio of the mean KL of windows, with its interval: paired, so it is the standard error
    of the difference, as a share."""
    error = (mine - theirs).std().item() / math.sqrt(len(mine))
    ours, peer = mine.mean().item(), theirs.mean().item()
    interval = [(ours + sign * 1.96 * error) / peer for sign in (-1, 1)]
    return {"peer_kl": peer, "ratio": ours / peer, "ratio_95": interval}


def run(script: str, python: str, source: Path, out: Path, how: str, rows: Tensor) -> list[float]:
    """Seconds from the start of a process until it has written ``out``, of them after start-up, and
    what else it tells; nothing if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    tokens = out.parent / "tokens.safetensors"
    save_file({"input_ids": rows.contiguous()}, tokens)
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    # Compiled once, as an installed package is: an editable one is compiled in every process else.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.time()
    done = subprocess.run(
        [python, "-c", script, str(source), str(out), how, str(tokens)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=out.parent,
        check=False,
    )
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return []
    line = next(line for line in done.stdout.splitlines() if line.startswith("TIMES"))
    begun, ended, *more = (float(word) for word in line.split()[1:])
    return [ended - start, ended - begun, *more]


def times(options: argparse.Namespace, source: Path, name: str, rows: Tensor) -> dict[str, Any]:
    """Quantize with both, and say what it took."""
    method, arguments = CASES[name]
    found: dict[str, Any] = {"case": name, "method": method}
    mine = run(OURS, options.python, source, options.work / "ours", method, rows)
    if not mine:
        sys.exit(1)
    found["seconds"], found["seconds_without_start"], blocks, moments, choosing = mine
    found["stages"] = {
        "start": mine[0] - mine[1],
        "forward": blocks - moments - choosing,
        "moments": moments,
        "choosing": choosing,
        "writing": mine[1] - blocks,
    }
    if options.peer_python and arguments:
        how = json.dumps(arguments)
        theirs = run(PEER, options.peer_python, source, options.work / "peer", how, rows)
        if theirs:
            found["peer_seconds"], found["peer_seconds_without_start"] = theirs
            found["time"] = mine[0] / theirs[0]
            found["time_without_start"] = mine[1] / theirs[1]
    return found


def told(row: dict[str, Any]) -> str:
    """A case in lines of text."""
    line = f"{row['case']:26} {row['seconds']:6.1f} s"
    if "kl" in row:
        line += f"  KL {row['kl']:.5f}"
    if "ratio" in row:
        low, high = row["ratio_95"]
        line += f"   peer {row['peer_kl']:.5f}   ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    if "time" in row:
        line += (
            f"   peer {row['peer_seconds']:6.1f} s   time {row['time']:.3f}"
            f" ({row['time_without_start']:.3f} without start-up)"
        )
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items())
    return f"{line}\n    {stages}"


def wide(options: argparse.Namespace, rows: Tensor) -> list[dict[str, Any]]:
    """Times on random blocks of width 2048."""
    source = fabricate(options.work / f"wide-{options.wide}", "1.1b", options.wide)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, source / name)
    results = []
    for name in options.only:
        results.append(times(options, source, name, rows))
        if not options.json:
            print(told(results[-1]), flush=True)
    return results


def judged(options: argparse.Namespace, calibration: Tensor) -> list[dict[str, Any]]:
    """Times and divergences on the model of the tree."""
    held = windows(options.windows, 512, "held.txt")
    model: Any = quantmill.load(MODEL)
    reference = [log_probabilities(model, row.unsqueeze(0))[0] for row in held]
    del model
    results = []
    for name in options.only:
        row = times(options, MODEL, name, calibration)
        mine = divergences(quantmill.load(options.work / "ours"), held, reference)
        row["kl"] = mine.mean().item()
        if "peer_seconds" in row:
            theirs = divergences(quantmill.load(options.work / "peer"), held, reference)
            row |= compared(mine, theirs)
        results.append(row)
        if not options.json:
            print(told(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python", help="interpreter of an environment with GPTQModel")
    parser.add_argument("--python", default=sys.executable, help="interpreter for ours")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--wide", type=int, help="blocks of width 2048 to time, without quality")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    calibration = windows(options.samples, 512, "calib.txt")
    results = wide(options, calibration) if options.wide else judged(options, calibration)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
