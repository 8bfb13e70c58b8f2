"""Calibrated quantization beside GPTQModel: KL divergence, time, on the same windows.

    python benchmarks/calibrated.py WORK [--peer-python PYTHON] [--only NAME ...] [--json]

Both quantize the same model with the same calibration tokens, and we load and judge both files:
mean KL per token to the float model over held-out windows, and the paired difference per window.
``--wide 2`` times both on two random blocks of width 2048 instead, where start-up weighs little.
The peer runs in a process of its own, with the interpreter of an environment that has it.
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
PEER = r"""
import json, sys, time, torch
torch.set_num_threads(2)
source, out, arguments, tokens = sys.argv[1:5]
from gptqmodel import GPTQModel, QuantizeConfig
rows = json.load(open(tokens))
model = GPTQModel.load(source, QuantizeConfig(**json.loads(arguments)), device="cpu",
                       dtype=torch.bfloat16)
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
start = time.perf_counter()
model.quantize(data, batch_size=8)
seconds = time.perf_counter() - start
model.save(out)
print("SECONDS", seconds)
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


def ours(source: Path, out: Path, method: str, rows: Tensor) -> float:
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    quantmill.quantize(source, out, method, calibration=rows, samples=len(rows))
    return time.perf_counter() - start


def peer(
    python: str, source: Path, out: Path, arguments: dict[str, Any], rows: Tensor
) -> float | None:
    shutil.rmtree(out, ignore_errors=True)
    tokens = out.parent / "tokens.json"
    tokens.write_text(json.dumps(rows.tolist()))
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", PEER, str(source), str(out), json.dumps(arguments), str(tokens)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return None
    line = next(line for line in done.stdout.splitlines() if line.startswith("SECONDS"))
    return float(line.split()[1])


def wide(options: argparse.Namespace, rows: Tensor) -> None:
    """Times on random blocks of width 2048."""
    source = fabricate(options.work / "wide", "1.1b", options.wide)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, source / name)
    results = []
    for name in options.only:
        method, arguments = CASES[name]
        mine = ours(source, options.work / "ours", method, rows)
        row = {"case": name, "method": method, "seconds": mine}
        line = f"{name:26} {mine:6.1f} s"
        if options.peer_python and arguments:
            theirs = peer(options.peer_python, source, options.work / "peer", arguments, rows)
            if theirs is not None:
                row |= {"peer_seconds": theirs, "ratio": mine / theirs}
                line += f"   peer {theirs:6.1f} s   ratio {mine / theirs:.3f}"
        results.append(row)
        if not options.json:
            print(line, flush=True)
    if options.json:
        print(json.dumps(results, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python", help="interpreter of an environment with GPTQModel")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--wide", type=int, help="blocks of width 2048 to time, without quality")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    calibration = windows(options.samples, 512, "calib.txt")
    if options.wide:
        wide(options, calibration)
        return
    held = windows(options.windows, 512, "held.txt")
    model: Any = quantmill.load(MODEL)
    reference = [log_probabilities(model, row.unsqueeze(0))[0] for row in held]
    del model
    results = []
    for name in options.only:
        method, arguments = CASES[name]
        row: dict[str, Any] = {"case": name, "method": method}
        row["seconds"] = ours(MODEL, options.work / "ours", method, calibration)
        mine = divergences(quantmill.load(options.work / "ours"), held, reference)
        row["kl"] = mine.mean().item()
        if options.peer_python and arguments:
            row["peer_seconds"] = peer(
                options.peer_python, MODEL, options.work / "peer", arguments, calibration
            )
            if row["peer_seconds"] is not None:
                theirs = divergences(quantmill.load(options.work / "peer"), held, reference)
                row |= compared(mine, theirs)
        results.append(row)
        if not options.json:
            line = f"{name:26} KL {row['kl']:.5f}  {row['seconds']:6.1f} s"
            if "ratio" in row:
                low, high = row["ratio_95"]
                line += (
                    f"   peer {row['peer_kl']:.5f}  {row['peer_seconds']:6.1f} s"
                    f"   ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
                    f"  time {row['seconds'] / row['peer_seconds']:.3f}"
                )
            print(line, flush=True)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
