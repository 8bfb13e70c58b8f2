"""The main job on a real model: plan, quantize on the fly, evaluate, save, reload, generate.

Run by ``make demo``. Uses novella, the small Llama that ships in ``models/``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import quantmill
from quantmill.evaluate import ReferenceCache, ReferenceSpec, evaluate_model, tokenize

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("bnb-int8", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4")
NAMES = {
    None: "bf16",
    "bnb-int8": "int8",
    "bnb-nf4": "NF4",
    "bnb-nf4-dq": "NF4 + DQ",
    "bnb-fp4": "FP4",
}


def show_plan(console: Console, model: Path) -> None:
    """The plan of NF4, one row for each kind of module."""
    plan = quantmill.plan(model, "bnb-nf4")
    table = Table(title=f"plan: {model.name} with bnb-nf4")
    for column in ("module", "action", "shape", "before", "after", "why"):
        table.add_column(column)
    seen = set()
    for item in plan.modules:
        short = ".".join("*" if part.isdigit() else part for part in item.name.split("."))
        if item.action == "not-a-target" or short in seen:
            continue
        seen.add(short)
        table.add_row(
            short,
            item.action,
            "x".join(map(str, item.shape)),
            f"{item.bytes_before:,}",
            f"{item.bytes_after:,}",
            item.reason,
        )
    console.print(table)
    totals = plan.totals
    console.print(
        f"{totals['quantized']} modules quantized, {totals['kept']} kept; "
        f"{totals['bytes_before']:,} bytes before, {totals['bytes_after']:,} after, "
        f"{totals['bits_per_weight']:.2f} bits per quantized weight, "
        f"peak {totals['peak_bytes']:,} bytes"
    )
    for finding in plan.findings:
        console.print(f"  {finding}")


def generate(model: Any, tokenizer: Any, prompt: str) -> str:
    """A greedy continuation of 40 tokens."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(
            input_ids=inputs["input_ids"],
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=1,
        )
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def main() -> int:
    """Run the demo; the exit code says whether the reloaded checkpoint is the same model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "novella")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "novella-nf4")
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens to score")
    parser.add_argument("--prompt", default="It was a dark night, and the old house")
    options = parser.parse_args()
    # Piped output has no width of its own: let nothing be cut there.
    console = Console(width=None if sys.stdout.isatty() else 140)
    torch.manual_seed(0)

    show_plan(console, options.model)
    tokenizer = quantmill.load_tokenizer(options.model)
    text = (options.model / "held.txt").read_text(encoding="utf-8")
    table = Table(title=f"quality on a held-out text, {options.windows} windows of 512 tokens")
    for column in ("method", "bytes", "perplexity", "KL per token", "top-1"):
        table.add_column(column, justify="right")
    # The float model's distributions go to a file, so that two models are never in memory at once.
    tokens, bos = tokenize(tokenizer, text)
    identity = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()
    spec = ReferenceSpec.of(identity, tokens, context=512, max_windows=options.windows, bos_id=bos)
    cache = ReferenceCache(ROOT / "out" / "cache")
    with Progress(console=console, transient=True) as progress:
        for method in (None, *METHODS):
            label = NAMES[method]
            task = progress.add_task(label, total=options.windows)
            model: Any = quantmill.load(options.model, method)
            size = resident_bytes(model)

            def tick(done: int, total: int, what: str, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            reference = cache.find(spec)
            writer = cache.writer(spec) if reference is None else None
            with writer or contextlib.nullcontext():
                result = evaluate_model(
                    model,
                    tokenizer,
                    text,
                    context=512,
                    max_windows=options.windows,
                    reference=reference,
                    collect_reference=writer,
                    progress=tick,
                )
            kl = "" if method is None else f"{result.kl_mean:.4f}"
            top = "" if method is None else f"{result.top1_agreement:.1%}"
            table.add_row(label, f"{size:,}", f"{result.perplexity:.3f}", kl, top)
            progress.remove_task(task)
            del model
            gc.collect()
    console.print(table)

    if options.out.exists():
        shutil.rmtree(options.out)
    report = quantmill.quantize(options.model, options.out, "bnb-nf4")
    on_the_fly: Any = quantmill.load(options.model, "bnb-nf4")
    first = generate(on_the_fly, tokenizer, options.prompt)
    reloaded: Any = quantmill.load(options.out)
    second = generate(reloaded, tokenizer, options.prompt)
    console.print(f"\n[bold]NF4 says:[/bold] {first}")
    same = first == second
    console.print(
        f"saved {report.bytes:,} bytes to {options.out}; reloaded, it says "
        + ("the same" if same else f"something else: {second}")
    )
    return 0 if same else 1


def resident_bytes(model: Any) -> int:
    """Bytes of all weights, one that two names share counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    raise SystemExit(main())
