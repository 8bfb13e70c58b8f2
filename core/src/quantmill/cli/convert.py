"""``quantmill convert``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from quantmill.cli.exits import OK, PROBLEM
from quantmill.cli.options import (
    DEVICE,
    DTYPES,
    JSON,
    QUIET,
    calibration_arguments,
    calibration_options,
    memory_bytes,
    not_empty,
)
from quantmill.cli.output import (
    print_json,
    progress_bar,
    show_findings,
    size,
    spanned,
    starred,
    table,
)

if TYPE_CHECKING:
    from quantmill.conversion.route import Route, Step
    from quantmill.conversion.run import ConversionReport


@click.command("convert")
@click.argument("source", callback=not_empty)
@click.argument("output", type=click.Path(), callback=not_empty)
@click.argument("method", callback=not_empty)
@click.option("--dry-run", is_flag=True, help="Explain the route and write nothing.")
@click.option(
    "--verify",
    is_flag=True,
    help="Decode what was written and compare it with the source; with --dry-run, settle the"
    " route by reading the tensors.",
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Quantize anew what does not fit exactly, and say what error that adds.",
)
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of what is float in both; the source's by default.",
)
@click.option(
    "--max-shard",
    callback=memory_bytes,
    metavar="SIZE",
    help="Most bytes of tensors in one file. [default: 5GB in a folder, no limit in a file]",
)
@calibration_options
@QUIET
@JSON
def command(
    source: str,
    output: str,
    method: str,
    max_shard: int | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Convert SOURCE to METHOD's format in the new folder or file OUTPUT, streaming.

    An OUTPUT that ends like a file of a known format (.gguf) is written as such.

    The weights keep their values: METHOD's fields that are not given follow the source. Where
    that can't be, the reason is shown, and --allow-requantize goes on with added error. METHOD
    may also be bf16, fp16 or fp32, for a float checkpoint.
    """
    import quantmill

    options |= calibration_arguments(options)
    with progress_bar("converting", quiet=quiet) as progress:
        report = quantmill.convert(
            source, output, method, progress=progress, max_shard_bytes=max_shard, **options
        )
    failed = report.written is None and bool(report.route.reasons())
    failed = failed and not options["allow_requantize"]
    if as_json:
        print_json(report.to_dict())
        return PROBLEM if failed else OK
    show_findings(report.route.findings)
    if report.written is None:
        _explain(report.route, options["allow_requantize"])
    else:
        _tell(report)
    return PROBLEM if failed else OK


def _explain(route: Route, allowed: bool) -> None:
    """The route as a table, one row for what repeats."""
    groups: dict[tuple[str, ...], list[Step]] = {}
    for step in route.steps:
        why = "; ".join((step.reason, *step.notes, *(f"unless {item}" for item in step.unless)))
        key = (starred(step.name), step.kind, step.source, step.result, why.strip("; "))
        groups.setdefault(key, []).append(step)
    alike = Counter(starred(step.name) for step in route.steps)
    table(
        f"{route.source} to {route.goal}",
        ("module", ">count", "step", "from", "to", ">before", ">after", "why"),
        [
            (
                spanned([step.name for step in steps], alike[name]),
                len(steps),
                kind,
                source,
                result or "?",
                size(sum(step.bytes_before for step in steps)),
                size(sum(step.bytes_after for step in steps)) if result else "?",
                why,
            )
            for (name, kind, source, result, why), steps in groups.items()
        ],
    )
    words = {
        "lossless": "No value changes.",
        "dequantize": "Weights become floats.",
        "quantize": "Float weights are quantized.",
        "requantize": "Weights are quantized anew, which adds error."
        if allowed
        else "Refused without --allow-requantize: values would change.",
    }[route.kind]
    if any(step.unless for step in route.steps):
        words = f"{words} That holds unless a condition is met: --verify reads the tensors to tell."
    click.echo(words)


def _tell(report: ConversionReport) -> None:
    written, route = report.written, report.route
    assert written is not None
    counts = ", ".join(f"{count} {kind}" for kind, count in route.counts.items())
    click.echo(
        f"wrote {size(written.bytes)} to {written.folder} in {written.seconds:.1f} s: {counts}"
    )
    if report.proved is not None:
        what = "to the source's values" if route.kind == "lossless" else "with the error stated"
        click.echo(f"verified: {report.proved} weights were decoded again, {what}")
    if route.kind == "lossless":
        click.echo("no value changed")
    elif report.rescaled:
        click.echo(
            "scales moved between weights, whose single errors mean nothing: compare outputs with"
            " `quantmill compare`"
        )
    elif report.errors:
        total = report.total
        worst = sorted(report.errors.items(), key=lambda item: -item[1].relative)[:5]
        table(
            "error added, worst first",
            ("module", ">relative", ">SNR", ">largest"),
            [
                (name, f"{d.relative:.3g}", f"{d.snr:.1f} dB", f"{d.largest:.3g}")
                for name, d in [*worst, ("all together", total)]
            ],
        )
