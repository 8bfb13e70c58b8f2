"""Our GPTQ and AWQ checkpoints in GPTQModel: the same logits.

    python benchmarks/interop_gptqmodel.py WORK --peer-python PYTHON [--reader transformers]

The peer lives in an environment of its own, so this is a script and no test of the default run.
With ``--reader transformers`` it is transformers' own ``from_pretrained`` that reads there, which
needs optimum beside GPTQModel. It prints the relative difference of logits for each file, and fails
above 0.2%.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import quantmill

METHODS: dict[str, Any] = {
    "gptq-4": "gptq-4:group_size=64",
    "gptq-4-v2": "gptq-4:group_size=64,checkpoint_format=gptq_v2",
    "gptq-4-asym-actorder": "gptq-4:group_size=32,sym=false,desc_act=true",
    "gptq-3": "gptq-3:group_size=64",
    "gptq-2-asym": "gptq-2:group_size=32",
    "gptq-5": "gptq-5:group_size=64",
    "gptq-7": "gptq-5:bits=7",
    "gptq-3-planar": "gptq-3:checkpoint_format=gptq_p",
    "gptq-8": "gptq-8:group_size=128",
    "gptq-mixture": {
        "method": "gptq-4:checkpoint_format=gptq_p",
        "assign": {
            "re:.*down_proj": "gptq-6:group_size=64",
            "re:.*v_proj": "gptq-5",
            "re:.*up_proj": "gptq-3:checkpoint_format=gptq_p,sym=false",
        },
    },
    "awq-4": "awq-4:group_size=64",
    "awq-4-sym": "awq-4-sym:group_size=64",
}
PEER = r"""
import sys, torch
from safetensors.torch import load_file, save_file
from gptqmodel import BACKEND, GPTQModel
folder, inputs, out, kind = sys.argv[1:5]
ids = load_file(inputs)["input_ids"]
backend = BACKEND.AWQ_TORCH if kind == "awq" else BACKEND.GPTQ_TORCH
model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16,
                       attn_implementation="eager")
if kind != "awq":
    model.model.float()
with torch.no_grad():
    save_file({"logits": model.model(input_ids=ids).logits.float().contiguous()}, out)
"""

TRANSFORMERS = r"""
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, inputs, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
with torch.no_grad():
    logits = model(input_ids=load_file(inputs)["input_ids"]).logits
save_file({"logits": logits.float().contiguous()}, out)
"""
READERS = {"gptqmodel": PEER, "transformers": TRANSFORMERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--reader", choices=list(READERS), default="gptqmodel")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    work = options.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source = Path(__file__).parent.parent / "models" / "novella"
    tokens = torch.randint(0, 4096, (16, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens[:2]}, work / "inputs.safetensors")
    failed = False
    for name in options.only:
        method = METHODS[name]
        folder = work / name
        quantmill.quantize(source, folder, method, calibration=tokens)
        model: Any = quantmill.load(folder, dtype="float32")
        with torch.inference_mode():
            ours = model(input_ids=tokens[:2]).logits
        done = subprocess.run(
            [
                options.peer_python,
                "-c",
                READERS[options.reader],
                str(folder),
                str(work / "inputs.safetensors"),
                str(work / "logits.safetensors"),
                name[:3],
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            failed = True
            print(f"{name}: the peer failed\n{done.stderr[-1200:]}")
            continue
        theirs = load_file(work / "logits.safetensors")["logits"]
        error = ((ours - theirs).norm() / theirs.norm()).item()
        failed |= error > 0.002
        print(f"{name:24} {error:.2e}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
