"""``quantmill eval``."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantmill.cli.options import (
    JSON,
    QUIET,
    calibration_arguments,
    calibration_options,
    model_options,
    not_empty,
)
from quantmill.cli.output import print_json, progress_bar, show_findings, table
from quantmill.findings import Findings

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.evaluate import ReferenceLogits


@click.command("eval")
@click.argument("source", callback=not_empty)
@click.argument("method", required=False, callback=not_empty)
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to score.",
)
@click.option(
    "--protocol",
    type=click.Choice(["blocks", "sliding", "llama.cpp"]),
    default="blocks",
    show_default=True,
    help="How the text is cut into windows.",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Window length in tokens.  [default: 512, or the model's positions if fewer]",
)
@click.option("--max-windows", type=click.IntRange(min=1), help="Score only the first windows.")
@click.option(
    "--reference", callback=not_empty, help="Float model to measure the KL divergence from."
)
@model_options
@calibration_options
@QUIET
@JSON
def command(
    source: str,
    method: str | None,
    text: Path,
    protocol: str,
    context: int | None,
    max_windows: int | None,
    reference: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure perplexity on a text and, with --reference, the KL divergence per token.

    The reference's distributions are cached on disk: two models are never in memory at once.
    """
    import quantmill
    from quantmill.checkpoint.containers import open_checkpoint
    from quantmill.evaluate import evaluate_model, get_protocol, tokenize
    from quantmill.evaluate.texts import read_text
    from quantmill.host import default_host

    words = read_text(text)
    tokenizer = quantmill.load_tokenizer(source)
    headers = [open_checkpoint(item, default_host()) for item in (source, reference) if item]
    length = context or _shortest(headers)
    tokens, bos = tokenize(tokenizer, words)
    # Before any model is loaded: a text too short is known now.
    get_protocol(protocol).check(tokens.numel(), length, max_windows)
    shared: dict[str, Any] = {
        "protocol": protocol,
        "context": length,
        "max_windows": max_windows,
    }
    stored = None
    if reference is not None:
        device = options["device"]
        stored = _reference(
            reference, headers[-1], tokenizer, (words, tokens, bos), shared, device, quiet
        )
    options |= calibration_arguments(options)
    with progress_bar("loading", quiet=quiet) as progress:
        model = quantmill.load(source, method, progress=progress, **options)
    with progress_bar("evaluating", quiet=quiet) as tick:
        result = evaluate_model(model, tokenizer, words, reference=stored, progress=tick, **shared)
    data = result.to_dict()
    if as_json:
        given = {"source": source, "method": method, "text": str(text), "reference": reference}
        print_json({**given, **data})
    else:
        table(
            f"{source}{' ' + method if method else ''} on {text.name}",
            ("measure", ">value"),
            [
                (key, f"{value:.5g}" if isinstance(value, float) else value)
                for key, value in data.items()
                if value is not None
            ],
        )


def _shortest(headers: list[CheckpointHeaders]) -> int:
    """The usual context, or fewer tokens where a model has fewer positions."""
    from quantmill.evaluate import DEFAULT_CONTEXT

    return min([DEFAULT_CONTEXT, *(_positions(item.config) for item in headers)])


def _positions(config: Mapping[str, Any]) -> int:
    from quantmill.evaluate import DEFAULT_CONTEXT

    places = (config, config.get("text_config"))
    for place in places:
        if isinstance(place, Mapping):
            value = place.get("max_position_embeddings") or place.get("n_positions")
            if isinstance(value, int) and value > 1:
                return value
    return DEFAULT_CONTEXT


def _reference(
    name: str,
    headers: CheckpointHeaders,
    tokenizer: Any,
    text: tuple[str, Any, int | None],
    shared: Mapping[str, Any],
    device: str,
    quiet: bool,
) -> ReferenceLogits | None:
    """The reference's distributions, computed only if the cache does not have them."""
    import quantmill
    from quantmill.evaluate import ReferenceCache, ReferenceSpec, evaluate_model

    words, tokens, bos = text
    # Another device adds up in another order.
    identity = f"{headers.source.identity()}|{device.partition(':')[0]}"
    spec = ReferenceSpec.of(identity, tokens, bos_id=bos, **shared)
    cache = ReferenceCache()
    findings = Findings()
    stored = cache.find(spec, findings)
    show_findings(findings)
    if stored is not None:
        return stored
    with progress_bar("loading the reference", quiet=quiet) as progress:
        model: Any = quantmill.load(name, progress=progress, device=device)
    with progress_bar("reference", quiet=quiet) as tick, cache.writer(spec) as writer:
        evaluate_model(model, tokenizer, words, collect_reference=writer, progress=tick, **shared)
    del model
    gc.collect()
    return cache.find(spec)
