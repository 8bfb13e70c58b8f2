"""``quantmill generate``."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import click

from quantmill.cli.options import JSON, QUIET, model_options
from quantmill.cli.output import print_json, progress_bar


@click.command("generate")
@click.argument("source")
@click.argument("method", required=False)
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", default=0, show_default=True)
@model_options
@QUIET
@JSON
def command(
    source: str,
    method: str | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Load SOURCE, quantized with METHOD if given, and continue a prompt."""
    import torch

    import quantmill

    tokenizer = quantmill.load_tokenizer(source)
    with progress_bar("loading", quiet=quiet) as progress:
        model: Any = quantmill.load(source, method, progress=progress, **options)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    start = perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    seconds = perf_counter() - start
    count = out.shape[1] - inputs["input_ids"].shape[1]
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    if as_json:
        print_json({"text": text, "new_tokens": count, "seconds": seconds})
    else:
        click.echo(text)
        click.echo(f"{count} tokens in {seconds:.2f} s", err=True)
