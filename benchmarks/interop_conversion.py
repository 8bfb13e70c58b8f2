"""Conversions held against the peers that own the formats.

    python benchmarks/interop_conversion.py WORK [--gptqmodel PYTHON] [--llamacpp BUILD/bin]
        [--budgets]

GPTQModel quantizes novella; we convert its checkpoint to AWQ, to GPTQ v2, to compressed-tensors and
to GGUF, and each peer runs what is its own:

- GPTQModel computes with its checkpoint, our AWQ and our GPTQ v2 made of it: the same logits;
- compressed-tensors, through transformers, loads our file: the same logits;
- llama.cpp reads our GGUF: the perplexity of its own protocol on held-out text.

Without a peer's option that part is left out; compressed-tensors has to be installed here.
`--budgets` has them run mixtures made under a budget instead: GPTQ's `dynamic`, groups of
compressed-tensors, types of tensors in a GGUF.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from interop_gptqmodel import PEER as RUN
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantmill
from quantmill.evaluate import evaluate_model

ROOT = Path(__file__).parent.parent
NOVELLA = ROOT / "models" / "novella"
MAKE = r"""
import json, sys, torch
torch.set_num_threads(2)
from gptqmodel import GPTQModel, QuantizeConfig
source, out, tokens = sys.argv[1:4]
rows = json.load(open(tokens))
config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False)
model = GPTQModel.load(source, config, device="cpu", dtype=torch.bfloat16)
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
model.save(out)
"""
BUDGETS = {
    "dynamic": ("4.25bpw", ["gptq-3", "gptq-4", "gptq-8"]),
    "groups": ("5bpw", ["ct-int4", "ct-int8"]),
    "types.gguf": ("5bpw", ["gguf-q4_0", "gguf-q5_0", "gguf-q8_0"]),
}
"""What is made under which budget of which methods."""
LIMIT = 2e-3
"""Largest relative difference of logits: the AWQ kernels of the peer compute in float16."""


def peer(python: str, code: str, *arguments: object) -> None:
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-1500:]}")


def make_source(python: str | None, work: Path) -> Path:
    """A GPTQ checkpoint of GPTQModel, or ours where it is not there."""
    out = work / "gptq"
    if out.exists():
        return out
    tokenizer = quantmill.load_tokenizer(NOVELLA)
    text = (NOVELLA / "calib.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 32 * 256]
    rows = [ids[i : i + 256] for i in range(0, len(ids), 256)]
    if python is None:
        quantmill.quantize(
            NOVELLA, out, "gptq-4:group_size=64", calibration=torch.tensor(rows), length=256
        )
        return out
    (work / "tokens.json").write_text(json.dumps(rows))
    peer(python, MAKE, NOVELLA, out, work / "tokens.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as the float model has them
        shutil.copy(NOVELLA / name, out)
    return out


def ours(folder: Path, ids: Tensor) -> Tensor:
    model: Any = quantmill.load(folder, dtype="float32")
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Table:
    """Rows, and whether one of them failed."""

    def __init__(self) -> None:
        self.failed = False

    def row(self, what: str, value: float, limit: float) -> None:
        bad = not value <= limit
        self.failed |= bad
        print(f"{what:64} {value:.2e}{'   TOO LARGE' if bad else ''}", flush=True)


def by_gptqmodel(python: str, work: Path, folder: Path, ids: Tensor, name: str = "gptq") -> Tensor:
    save_file({"input_ids": ids}, work / "inputs.safetensors")
    peer(python, RUN, folder, work / "inputs.safetensors", work / "logits.safetensors", name)
    return load_file(work / "logits.safetensors")["logits"]


def by_transformers(folder: Path, ids: Tensor) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu"
    )
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def gptqmodel(python: str, work: Path, source: Path, ids: Tensor, table: Table) -> None:
    logits = {
        name: by_gptqmodel(python, work, folder, ids, name)
        for name, folder in (("gptq", source), ("awq", work / "awq"), ("v2", work / "v2"))
    }
    table.row(
        "GPTQModel: our AWQ against its GPTQ", difference(logits["awq"], logits["gptq"]), LIMIT
    )
    table.row(
        "GPTQModel: our GPTQ v2 against its v1", difference(logits["v2"], logits["gptq"]), 1e-6
    )
    table.row(
        "our logits of its GPTQ against its own",
        difference(ours(source, ids), logits["gptq"]),
        1e-4,
    )


def compressed(work: Path, source: Path, ids: Tensor, table: Table) -> None:
    theirs = by_transformers(work / "ct", ids)
    table.row(
        "compressed-tensors: our file against the GPTQ", difference(theirs, ours(source, ids)), 1e-4
    )


def llamacpp(bins: Path, file: Path, source: Path, table: Table) -> None:
    text = NOVELLA / "held.txt"
    command = [str(bins / "llama-perplexity"), "-m", str(file), "-f", str(text)]
    command += ["-c", "512", "--chunks", "8", "-t", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"llama-perplexity failed:\n{(done.stdout + done.stderr)[-1500:]}")
    theirs = float(found[1])
    model: Any = quantmill.load(source, dtype="float32")
    result = evaluate_model(
        model,
        quantmill.load_tokenizer(NOVELLA),
        text.read_text(encoding="utf-8"),
        protocol="llama.cpp",
        context=512,
        max_windows=8,
    )
    print(f"llama.cpp's perplexity {theirs:.4f}, ours {result.perplexity:.4f}")
    # It rounds activations to 8 bits.
    table.row(f"llama.cpp: our {file.name}, perplexity", abs(theirs / result.perplexity - 1), 5e-3)


def budgets(options: argparse.Namespace, ids: Tensor, table: Table) -> None:
    """Mixtures made under a budget, in the peers that own their formats."""
    paths = {}
    for name, (budget, methods) in BUDGETS.items():
        paths[name] = path = options.work / name
        if not path.exists():
            quantmill.quantize_to_budget(
                *(NOVELLA, path, budget, methods),
                calibration=NOVELLA / "calib.txt",
                samples=8,
                length=128,
            )
    if options.gptqmodel:
        theirs = by_gptqmodel(options.gptqmodel, options.work, paths["dynamic"], ids)
        found = difference(theirs, ours(paths["dynamic"], ids))
        table.row("GPTQModel: our mixture, its `dynamic`", found, 1e-4)
    found = difference(by_transformers(paths["groups"], ids), ours(paths["groups"], ids))
    table.row("compressed-tensors in transformers: our mixture, its groups", found, 1e-4)
    if options.llamacpp:
        file = paths["types.gguf"]
        llamacpp(options.llamacpp, file, file, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--llamacpp", type=Path, metavar="BUILD/bin")
    parser.add_argument("--budgets", action="store_true")
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    if options.budgets:
        ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
        table = Table()
        budgets(options, ids, table)
        sys.exit(table.failed)
    source = make_source(options.gptqmodel, work)
    goals = {
        "awq": "awq",
        "v2": "gptq:checkpoint_format=gptq_v2",
        "ct": "compressed-tensors",
        "model.gguf": "gguf",
    }
    for name, method in goals.items():
        path = work / name
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        report = quantmill.convert(source, path, method, verify=True)
        print(f"{method:32} {report.route.kind}, {report.proved} weights proved", flush=True)
        if report.route.kind != "lossless":
            raise SystemExit("it is not lossless")
    ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    table = Table()
    if options.gptqmodel:
        gptqmodel(options.gptqmodel, work, source, ids, table)
    compressed(work, source, ids, table)
    if options.llamacpp:
        llamacpp(options.llamacpp, work / "model.gguf", source, table)
    sys.exit(table.failed)


if __name__ == "__main__":
    main()
