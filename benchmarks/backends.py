"""FP8, torchao, HQQ, Quanto and compressed-tensors beside the libraries that own the formats.

    python benchmarks/backends.py kl [--windows 40] [--only NAME ...] [--json]
    python benchmarks/backends.py load WORK [--only NAME ...] [--peer] [--rounds 1] [--size 252m]

``kl``: the same model (``models/novella``) and the same config; each library quantizes every linear
of the blocks itself (``quantizers.py``), and both results are judged as float weights: mean KL per
token to the float model over held-out windows. Where activations are rounded, both round them.
``load``: a fabricated Llama of 1.1B parameters (or 252M), quantized while loading; seconds and peak
memory after the imports and after loading a model of one small layer in the same way, each run in a
process of its own, in turn with transformers where it can (HQQ: its own library); the shortest of
the rounds counts for both.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from calibrated import MODEL, compared, divergences, log_probabilities, windows
from fabricate import SIZES, fabricate
from quantizers import CASES, Case
from torch import nn

import quantmill


def peer_model(case: Case) -> Any:
    """The model with the library's weights, and its rounding of inputs where that is asked for."""
    model: Any = quantmill.load(MODEL)
    rounding = case.inputs
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            with torch.no_grad():
                module.weight = nn.Parameter(case.weight(module.weight.detach()).to(torch.bfloat16))
            if rounding is not None:
                module.register_forward_pre_hook(lambda _, args: (rounding(args[0]),))
    return model


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    held = windows(options.windows, 512, "held.txt")
    model: Any = quantmill.load(MODEL)
    reference = [log_probabilities(model, row.unsqueeze(0))[0] for row in held]
    results = []
    for name in options.only or CASES:
        case = CASES[name]
        mine: Any = quantmill.load(MODEL, case.method, dequantize=case.inputs is None)
        ours = divergences(mine, held, reference)
        row: dict[str, Any] = {"case": name, "method": case.method, "kl": ours.mean().item()}
        try:
            theirs = divergences(peer_model(case), held, reference)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            row["peer"] = f"{type(error).__name__}: {str(error)[:80]}"
        else:
            row |= compared(ours, theirs)
        gc.collect()
        results.append(row)
        if not options.json:
            peer = row.get("peer", "")
            if "ratio" in row:
                low, high = row["ratio_95"]
                peer = f"{row['peer_kl']:.6f}   ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
            print(f"{name:28} KL {row['kl']:.6f}   library {peer}", flush=True)
    return results


LOADS: dict[str, str] = {
    "torchao-int8wo": "TorchAoConfig(q.Int8WeightOnlyConfig())",
    "torchao-float8wo": "TorchAoConfig(q.Float8WeightOnlyConfig())",
    "torchao-intx4wo": "TorchAoConfig(q.IntxWeightOnlyConfig(weight_dtype=torch.int4,"
    " granularity=q.PerGroup(128)))",
    "quanto-int8": "QuantoConfig(weights='int8')",
    "quanto-float8": "QuantoConfig(weights='float8')",
    "quanto-int4": "QuantoConfig(weights='int4')",
    "hqq-4": "hqq",
    "fp8-block": "",
    "fp8-row": "",
    "ct-int8": "",
    "ct-int4": "",
    "ct-fp8": "",
    "ct-nvfp4": "",
}
"""METHOD to transformers' config, the library's name, or nothing: neither quantizes so here."""

CHILD = r"""
import json, sys, tempfile, time
from pathlib import Path
folder, method, peer = sys.argv[1:4]
import torch, transformers, quantmill, quantmill.api
import quantmill.checkpoint.reader, quantmill.stages.quantize, quantmill.stages.replace
import quantmill_transformers.architecture, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
if peer:
    from transformers import QuantoConfig, TorchAoConfig
    import torchao.quantization as q
    from optimum import quanto
    from hqq.models.hf.base import AutoHQQHFModel
    from hqq.core.quantize import BaseQuantizeConfig
else:
    from quantmill.host import default_host
    from quantmill.registrations import resolve
    from quantmill.stages.select import parse_method
    found = default_host().methods[parse_method(method, default_host()).method]
    for name in (found.config, found.codec, found.quantizer, found.linear):
        resolve(name)
from quantmill.testing import write_tiny_llama
from quantmill.testing.memory import PeakMemory
torch.set_num_threads(2)

def load(folder):
    if not peer:
        return quantmill.load(folder, method)
    if peer == "hqq":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        AutoHQQHFModel.quantize_model(
            model, quant_config=BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
            compute_dtype=torch.bfloat16, device="cpu")
        return model
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=eval(peer), device_map="cpu")

with tempfile.TemporaryDirectory() as small:
    load(str(write_tiny_llama(Path(small) / "model", hidden=256, inner=512, layers=1)))
with PeakMemory() as memory:
    start = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - start
size = 0
if not peer:
    plan = model.quantmill_job.plan
    size = plan.totals["bytes_memory"]
print(json.dumps({"seconds": seconds, "peak": memory.bytes, "model": size}))
"""


def measure(folder: Path, method: str, peer: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), method, peer],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:160]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def seconds(run: dict[str, Any]) -> float:
    found: float = run.get("seconds", float("inf"))
    return found


def loads(options: argparse.Namespace) -> list[dict[str, Any]]:
    source = fabricate(options.work / f"llama-{options.size}", options.size)
    results = []
    for method in options.only or LOADS:
        peer = LOADS[method] if options.peer else ""
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(measure(source, method, ""))
            if peer:
                theirs.append(measure(source, method, peer))
        best = min(ours, key=seconds)
        row: dict[str, Any] = {"method": method, **best}
        if "error" not in best:
            row["of_bound"] = best["peak"] / (1.15 * best["model"] + (64 << 20))
        if peer:
            row["peer"] = min(theirs, key=seconds)
            if "seconds" in row["peer"] and "seconds" in best:
                row["ratio"] = best["seconds"] / row["peer"]["seconds"]
        results.append(row)
        if not options.json:
            print(json.dumps(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kl = commands.add_parser("kl")
    kl.add_argument("--windows", type=int, default=40)
    load = commands.add_parser("load")
    load.add_argument("work", type=Path)
    load.add_argument("--peer", action="store_true")
    load.add_argument("--rounds", type=int, default=1)
    load.add_argument("--size", choices=sorted(SIZES), default="1.1b")
    for part in (kl, load):
        part.add_argument("--only", nargs="*", default=[])
        part.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = table(options) if options.command == "kl" else loads(options)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
