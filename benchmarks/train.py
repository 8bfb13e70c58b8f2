"""Training adapters: seconds of a step beside the peers, on the CPU or a GPU.

    python benchmarks/train.py WORK [--methods bnb-nf4 quanto-int4 ...] [--tokens 256] [--json OUT]
    python benchmarks/train.py WORK --device cuda --size 1.1b --tokens 2048

A step is the forward and backward pass of one sequence through a fabricated Llama with LoRA of rank
16 on every linear of its blocks (PEFT's, for all alike). All contenders are loaded in one process
and take turns; shown is the fastest of the rounds, and its ratio to that of transformers with
bitsandbytes' NF4. ``bnb-nf4`` here is the same format, computed by us.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from decode import nf4
from fabricate import SIZES, fabricate
from torch import nn

TARGETS = r".*layers\.\d+\..*_proj"


def adapted(model: Any) -> nn.Module:
    """The model with adapters, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    from quantmill_transformers.lora import lora_config

    model.requires_grad_(False)
    model.enable_input_require_grads()
    config = lora_config(LoraConfig(r=16, target_modules=TARGETS))
    found: nn.Module = get_peft_model(model, config).train()
    return found


def step(model: nn.Module, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--methods", nargs="+", default=["bnb-nf4", "quanto-int4", "quanto-int8", "fp8-block"]
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--size", choices=sorted(SIZES), default="252m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import transformers
    from transformers import AutoModelForCausalLM

    import quantmill

    transformers.utils.logging.disable_progress_bar()
    source = fabricate(options.work / f"llama-{options.size}", options.size)
    place = {"device_map": {"": options.device}}

    def peer(**more: Any) -> nn.Module:
        more |= {"dtype": torch.bfloat16, **place}
        return adapted(AutoModelForCausalLM.from_pretrained(source, **more))

    models = {"transformers bf16": peer(), "bitsandbytes NF4": peer(quantization_config=nf4())}
    for method in options.methods:
        models[f"quantmill {method}"] = adapted(
            quantmill.load(source, method, device=options.device)
        )
    tokens = torch.randint(
        3, 30000, (1, options.tokens), generator=torch.Generator().manual_seed(0)
    )
    tokens = tokens.to(options.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            spent = step(model, tokens)
            if turn:
                times[name].append(spent)
    base = min(times["bitsandbytes NF4"])
    rows = []
    for name, found in times.items():
        rows.append({"who": name, "seconds": min(found), "of_bitsandbytes": min(found) / base})
        print(f"{name:26} {min(found):7.2f} s a step  {min(found) / base:5.2f} of bitsandbytes")
    if options.json:
        text = json.dumps({"tokens": options.tokens, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
