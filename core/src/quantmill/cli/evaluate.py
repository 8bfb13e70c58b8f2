"""``quantmill eval``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import click

from quantmill.cli.options import JSON, QUIET, model_options
from quantmill.cli.output import print_json, progress_bar, table


@click.command("eval")
@click.argument("source")
@click.argument("method", required=False)
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--protocol",
    type=click.Choice(["blocks", "sliding", "llama.cpp"]),
    default="blocks",
    show_default=True,
)
@click.option("--context", type=int, help="Window length in tokens.")
@click.option("--max-windows", type=int, help="Score only the first windows.")
@click.option("--reference", help="Float model to measure the KL divergence from.")
@model_options
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
    from quantmill.checkpoint.source import open_source
    from quantmill.evaluate import (
        ReferenceCache,
        ReferenceSpec,
        default_context,
        evaluate_model,
        tokenize,
    )

    tokenizer = quantmill.load_tokenizer(source)
    words = text.read_text(encoding="utf-8")
    shared: dict[str, Any] = {"protocol": protocol, "max_windows": max_windows}
    stored = None
    if reference is not None:
        tokens, bos = tokenize(tokenizer, words)
        with progress_bar("loading the reference", quiet=quiet) as progress:
            model: Any = quantmill.load(reference, progress=progress)
        length = context or default_context(model)
        spec = ReferenceSpec.of(
            open_source(reference).identity(),
            tokens,
            protocol=protocol,
            context=length,
            max_windows=max_windows,
            bos_id=bos,
        )
        cache = ReferenceCache()
        stored = cache.find(spec)
        if stored is None:
            with progress_bar("reference", quiet=quiet) as tick, cache.writer(spec) as writer:
                evaluate_model(
                    model,
                    tokenizer,
                    words,
                    context=length,
                    collect_reference=writer,
                    progress=tick,
                    **shared,
                )
            stored = cache.find(spec)
        context = length
        del model
        gc.collect()
    with progress_bar("loading", quiet=quiet) as progress:
        model = quantmill.load(source, method, progress=progress, **options)
    with progress_bar("evaluating", quiet=quiet) as tick:
        result = evaluate_model(
            model, tokenizer, words, context=context, reference=stored, progress=tick, **shared
        )
    data = result.to_dict()
    if as_json:
        print_json(data)
    else:
        table(
            f"{source} {method or ''} on {text.name}",
            ("measure", ">value"),
            [
                (key, f"{value:.5g}" if isinstance(value, float) else value)
                for key, value in data.items()
                if value is not None
            ],
        )
