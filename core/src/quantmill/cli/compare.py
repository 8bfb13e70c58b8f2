"""``quantmill compare``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantmill.cli.options import DEVICE, JSON, QUIET, not_empty
from quantmill.cli.output import print_json, progress_bar, show_findings, size, table

if TYPE_CHECKING:
    from quantmill.comparison.report import Comparison


@click.command("compare")
@click.argument("first", callback=not_empty)
@click.argument("second", callback=not_empty)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text on which both compute: KL divergence, same top token, perplexity.",
)
@click.option("--context", type=click.IntRange(min=2), help="Window length in tokens.")
@click.option("--max-windows", type=click.IntRange(min=1), help="Score only the first windows.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report as one self-contained page.",
)
@click.option("--all", "everything", is_flag=True, help="Every weight, not one row per kind.")
@DEVICE
@QUIET
@JSON
def command(
    first: str,
    second: str,
    text: Path | None,
    context: int | None,
    max_windows: int | None,
    html: Path | None,
    everything: bool,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare two checkpoints of one model, in any formats; FIRST is the reference.

    Weights are compared one by one (SNR, relative and largest error, bytes); with --text, also
    what the two models compute.
    """
    import quantmill

    with progress_bar("comparing", quiet=quiet) as progress:
        found = quantmill.compare(
            first,
            second,
            text=text,
            context=context,
            max_windows=max_windows,
            device=device,
            progress=progress,
        )
    if html is not None:
        from quantmill.comparison.page import page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(found, size), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
        return
    show_findings(found.findings)
    _show(found, everything)
    if html is not None:
        click.echo(f"report: {html}")


def _show(found: Comparison, everything: bool) -> None:
    from quantmill.conversion.measure import Distance

    groups: dict[tuple[str, ...], list[int]] = {}
    matrices = [item for item in found.modules if item.is_matrix]
    for index, item in enumerate(matrices):
        name = item.name if everything else item.projection
        groups.setdefault((name, *item.forms), []).append(index)
    rows = []
    for (name, *forms), members in groups.items():
        together = Distance()
        for index in members:
            together.join(matrices[index].distance)
        sizes = [sum(matrices[index].bytes[side] for index in members) for side in (0, 1)]
        worst = max(found.error(matrices[index]) for index in members)
        rows.append(
            (
                name,
                len(members),
                *forms,
                size(sizes[0]),
                size(sizes[1]),
                "equal" if math.isinf(together.snr) else f"{together.snr:.1f} dB",
                f"{together.relative:.4f}",
                f"{worst:.4f}",
                f"{together.largest:.3g}",
            )
        )
    table(
        f"{found.names[1]} against {found.names[0]}",
        (
            "weight",
            ">count",
            "A",
            "B",
            ">bytes A",
            ">bytes B",
            ">SNR",
            ">relative",
            ">worst",
            ">largest",
        ),
        rows,
    )
    total, judged = found.total, found.judgement
    words = "every weight is equal" if total.equal else f"{total.snr:.1f} dB over all weights"
    click.echo(f"{size(found.bytes[0])} and {size(found.bytes[1])} on disk; {words}.")
    if judged is not None:
        interval = judged.kl_interval
        around = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval is not None else ""
        click.echo(
            f"On {judged.tokens:,} tokens of {judged.text}: KL {judged.kl:.4f} nats per token"
            f"{around}, same top token {judged.top1_agreement:.1%}, perplexity"
            f" {judged.perplexity[1]:.3f} of {judged.perplexity[0]:.3f}."
        )
