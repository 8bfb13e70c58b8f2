"""``quantmill generate``."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import click

from quantmill.cli.options import (
    JSON,
    QUIET,
    calibration_arguments,
    calibration_options,
    model_options,
    not_empty,
    real_number,
)
from quantmill.cli.output import print_json, progress_bar
from quantmill.findings import QuantmillError


@click.command("generate")
@click.argument("source", callback=not_empty)
@click.argument("method", required=False, callback=not_empty)
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    callback=real_number,
    help="0 is greedy.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@model_options
@calibration_options
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
    from quantmill.cli.errors import CANT_GENERATE

    tokenizer = quantmill.load_tokenizer(source)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise click.UsageError("--prompt gives no tokens: write some text")
    options |= calibration_arguments(options)
    with progress_bar("loading", quiet=quiet) as progress:
        model: Any = quantmill.load(source, method, progress=progress, **options)
    if not hasattr(model, "generate"):
        cause = f"{type(model).__name__} has no generate()"
        raise QuantmillError(CANT_GENERATE(source, cause, "take a causal language model"))
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    start = perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, **sampling)
    seconds = perf_counter() - start
    count = out.shape[1] - inputs["input_ids"].shape[1]
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    if as_json:
        print_json({"text": text, "new_tokens": count, "seconds": seconds})
    else:
        click.echo(text)
        click.echo(f"{count} tokens in {seconds:.2f} s", err=True)
