"""The comparison as one HTML page: styles, charts and data inside, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import PurePath

from quantmill.comparison.charts import bars, heatmap, histogram, lines
from quantmill.comparison.report import Comparison
from quantmill.comparison.weights import SPAN, ModuleComparison, usage

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --ink: #1d1c1a; --soft: #6b6860; --rule: #e3dfd6; --card: #ffffff;
  --first: #1d1c1a; --second: #3b7ea1; --low: #1d1c1a; --middle: #1d1c1a; --high: #ffffff;
  --ramp-0: #e8f1f5; --ramp-1: #c7dfe9; --ramp-2: #9cc6d8; --ramp-3: #6aa7c2; --ramp-4: #e9d8a6;
  --ramp-5: #ecb665; --ramp-6: #e08a3c; --ramp-7: #c8551f; --ramp-8: #8f2d12;
  --series-0: #3b7ea1; --series-1: #d07c26; --series-2: #5b8c3e; --series-3: #9a4f96;
  --series-4: #b23a48; --series-5: #6c757d; --series-6: #2a9d8f; --series-7: #8a6d3b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #171614; --ink: #eceae4; --soft: #a09c92; --rule: #35332e; --card: #201f1c;
  --first: #eceae4; --second: #5aa9d0; --low: #eceae4; --middle: #171614; --high: #171614;
  --ramp-0: #22313a; --ramp-1: #2b4a5a; --ramp-2: #35657c; --ramp-3: #4287a5; --ramp-4: #8f8560;
  --ramp-5: #b98f4a; --ramp-6: #d07f38; --ramp-7: #dc6a35; --ramp-8: #f08a6a;
  --series-0: #5aa9d0; --series-1: #e0974a; --series-2: #86b868; --series-3: #c58ac1;
  --series-4: #e07a84; --series-5: #a4abb2; --series-6: #5cc4b7; --series-7: #c2a26b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 36px 24px 80px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 44px 0 4px; }
p { margin: 4px 0 14px; max-width: 74ch; } .soft, figcaption { color: var(--soft); }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin: 22px 0 8px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px; }
.card b { display: block; font-size: 23px; line-height: 1.2; letter-spacing: -0.02em; }
.card span { color: var(--soft); font-size: 13px; }
figure { margin: 14px 0; overflow-x: auto; } .grid3 { display: flex; flex-wrap: wrap; gap: 14px; }
figure > svg { max-width: 100%; min-width: min(640px, 160vw); height: auto; }
svg { display: block; } svg .on-low { fill: var(--low); } svg .on-middle { fill: var(--middle); }
svg .on-high { fill: var(--high); } figcaption { overflow-wrap: anywhere; }
svg text { fill: var(--ink); font-size: 11.5px; }
svg .tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 1.8; } svg .first { fill: none; stroke: var(--first);
  stroke-width: 1.3; } svg .second { fill: var(--second); opacity: 0.75; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule);
  white-space: nowrap; } td code { overflow-wrap: normal; }
th { color: var(--soft); font-weight: 500; cursor: pointer; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { max-height: 560px; overflow: auto; border: 1px solid var(--rule); border-radius: 8px;
  padding: 0 12px; margin-bottom: 18px; background: var(--card); }
.scroll th { position: sticky; top: 0; background: var(--card); }
.lead { font-size: 17px; margin: 14px 0 4px; }
.note { border-left: 3px solid var(--ramp-6); padding: 4px 12px; margin: 14px 0; }
"""
_SORT = """
for (const head of document.querySelectorAll('th')) head.onclick = () => {
  const table = head.closest('table'), i = [...head.parentNode.children].indexOf(head);
  const up = head.dataset.up = head.dataset.up === '1' ? '0' : '1';
  const key = row => { const c = row.children[i]; return c.dataset.v ?? c.textContent; };
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = key(a), y = key(b), d = x - y;
    return (Number.isNaN(d) ? x.localeCompare(y) : d) * (up === '1' ? 1 : -1); });
  table.tBodies[0].append(...rows);
};
"""


def page(found: Comparison, size: Callable[[float], str]) -> str:
    """The whole document; ``size`` puts bytes into words."""
    a, b = (PurePath(name).name or name for name in found.names)
    matrices = [item for item in found.modules if item.is_matrix]
    parts = [
        f"<h1 title='{escape(found.names[1], quote=True)}'>{escape(b)}<br>"
        f"<span class='soft' title='{escape(found.names[0], quote=True)}'>"
        f"against {escape(a)}</span></h1>",
        f"<p class='lead'>{escape(_headline(found, matrices, a, b))}</p>",
        f"<p class='soft'>{escape(found.methods[1])} against {escape(found.methods[0])}</p>",
        _cards(found, size),
        *(
            f"<div class='note'>{escape(item.cause)}</div>"
            for item in found.findings
            if item.code.startswith("QM-COMPARE")
        ),
    ]
    differing = [item for item in matrices if not item.distance.equal]
    if differing:
        parts += [
            _section(
                "Where the error is",
                "Relative error of each weight, by layer and projection, on a logarithmic scale."
                + (
                    " Columns are scaled to fit, since scales were moved." if found.rescaled else ""
                ),
                _heat(found, differing),
            ),
            _section(
                "Signal to noise by layer",
                "In decibels: 6 more is half the error.",
                _noise(found, differing),
            ),
        ]
    parts += [
        _section("Bytes on disk", "By the role of the weights.", _bytes(found, matrices, size)),
        _section(
            "Values",
            f"Weights over {SPAN:g} standard deviations to each side, all layers of a projection"
            " together: the first as a line, the second filled. Heights are square roots, so that"
            " tails can be seen.",
            _values(matrices),
        ),
        _section(
            "Codes",
            "How often each code is used. Few or uneven codes are bits that carry nothing.",
            _codes(matrices),
        ),
        _section("Every weight", "Click a heading to sort.", _table(found, matrices, size)),
        "<p class='soft'>Made by quantmill. Numbers are in the tooltips of the charts; the same"
        " data as JSON: <code>quantmill compare --json</code>.</p>",
    ]
    title = f"{b} against {a}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        + "\n".join(part for part in parts if part)
        + f"</main><script>{_SORT}</script></body></html>\n"
    )


def _section(title: str, words: str, body: str) -> str:
    if not body:
        return ""
    return f"<h2>{title}</h2><p class='soft'>{words}</p>{body}"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else ""


def _headline(found: Comparison, matrices: Sequence[ModuleComparison], a: str, b: str) -> str:
    """In a sentence: what the second one saves, what it loses by that, and where."""
    share = f"{b} takes {found.bytes[1] / max(1, found.bytes[0]):.0%} of the bytes of {a}"
    placed = [item for item in matrices if item.layer is not None and not item.distance.equal]
    if found.total.equal or not placed:
        return f"{share}, and every weight has the same value."
    said = ""
    if found.judgement is not None:
        judged = found.judgement
        said = (
            f" It gives the same most likely token {judged.top1_agreement:.1%} of the time, at"
            f" {judged.kl:.4f} nats of KL divergence and a perplexity of {judged.perplexity[1]:.2f}"
            f" for {judged.perplexity[0]:.2f}."
        )
    worst, best = (pick(placed, key=found.error) for pick in (max, min))
    where = (
        f" The error is largest in {worst.projection} of layer {worst.layer}"
        f" ({found.error(worst):.1%}), smallest in {best.projection} of layer {best.layer}"
        f" ({found.error(best):.1%})."
    )
    return f"{share}.{said}{where}"


def _cards(found: Comparison, size: Callable[[float], str]) -> str:
    total, judged = found.total, found.judgement
    cards = [(size(found.bytes[1]), f"on disk, of {size(found.bytes[0])}")]
    if total.equal:
        cards.append(("equal", "every weight has the same value"))
    else:
        cards.append((f"{total.snr:.1f} dB", "signal to noise over all weights"))
    if judged is not None:
        interval = judged.kl_interval
        around = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval is not None else ""
        cards += [
            (f"{judged.kl:.4f}", f"KL divergence, nats per token{around}"),
            (f"{judged.top1_agreement:.1%}", "same most likely token"),
            (
                f"{judged.perplexity[1]:.3f}",
                f"perplexity, of {judged.perplexity[0]:.3f}; {judged.tokens:,} tokens of"
                f" {judged.text}",
            ),
        ]
    return (
        "<div class='cards'>"
        + "".join(
            f"<div class='card'><b>{escape(value)}</b><span>{escape(words)}</span></div>"
            for value, words in cards
        )
        + "</div>"
    )


def _projections(items: Iterable[ModuleComparison]) -> list[str]:
    """Names of projections in the order of the model."""
    return list(dict.fromkeys(item.projection for item in items if item.layer is not None))


def _heat(found: Comparison, items: Sequence[ModuleComparison]) -> str:
    cells = {
        (item.projection, str(item.layer)): found.error(item)
        for item in items
        if item.layer is not None
    }
    layers = sorted({item.layer for item in items if item.layer is not None})
    svg = heatmap(
        _projections(items),
        [str(layer) for layer in layers],
        lambda row, column: cells.get((row, column)),
        lambda value: f"{value:.2%}" if value < 10 else f"{value:.3g}",
        label="relative error by layer and projection",
    )
    return _figure(svg)


def _noise(found: Comparison, items: Sequence[ModuleComparison]) -> str:
    series: dict[str, list[tuple[int, float]]] = {}
    for item in items:
        error = found.error(item)
        if item.layer is not None and error > 0:
            series.setdefault(item.projection, []).append((item.layer, -20 * math.log10(error)))
    return _figure(lines(series, label="signal to noise by layer", unit="dB", axis="layer"))


def _bytes(
    found: Comparison, items: Sequence[ModuleComparison], size: Callable[[float], str]
) -> str:
    sums: dict[str, list[float]] = {}
    for item in items:
        both = sums.setdefault(item.role or "other", [0.0, 0.0])
        both[0] += item.bytes[0]
        both[1] += item.bytes[1]
    order = sorted(sums, key=lambda role: -sums[role][0])
    rows = [(name, [(role, sums[role][side]) for role in order]) for side, name in enumerate("AB")]
    svg = bars(rows, size, label="bytes by role")
    key = f"<figcaption>A is {escape(found.names[0])}, B is {escape(found.names[1])}</figcaption>"
    return f"<figure>{svg}{key}</figure>" if svg else ""


def _sums(counts: Iterable[Sequence[int]]) -> list[int]:
    rows = [list(row) for row in counts if row]
    return [sum(column) for column in zip(*rows, strict=True)] if rows else []


def _values(items: Sequence[ModuleComparison]) -> str:
    drawn = []
    for name in _projections(items):
        group = [item for item in items if item.projection == name and item.layer is not None]
        pair = [_sums(item.values[side] for item in group) for side in (0, 1)]
        drawn.append(histogram(pair[0], pair[1], name, label=f"values of {name}"))
    return f"<div class='grid3'>{''.join(drawn)}</div>" if drawn else ""


def _codes(items: Sequence[ModuleComparison]) -> str:
    drawn = []
    for name in _projections(items):
        group = [item for item in items if item.projection == name and item.layer is not None]
        for side, letter in enumerate("AB"):
            widths: dict[int, list[list[int]]] = {}
            for item in group:
                codes = item.codes[side]
                if codes:
                    widths.setdefault(len(codes), []).append(codes)
            for width, rows in sorted(widths.items()):
                counts = _sums(rows)
                told = usage(counts)
                bits = f", {told['entropy_bits']:.2f} of {math.log2(width):g} bits" if told else ""
                drawn.append(
                    histogram(
                        [],
                        counts,
                        f"{letter}: {name}{bits}",
                        label=f"codes of {name} in {letter}",
                        discrete=True,
                    )
                )
    return f"<div class='grid3'>{''.join(drawn)}</div>" if drawn else ""


def _table(
    found: Comparison, items: Sequence[ModuleComparison], size: Callable[[float], str]
) -> str:
    heads = (
        ("weight", ""),
        ("A", ""),
        ("B", ""),
        ("bytes", "n"),
        ("relative", "n"),
        ("SNR", "n"),
        ("largest", "n"),
    )
    rows = []
    for item in items:
        d = item.distance
        snr = "" if math.isinf(d.snr) else f"{d.snr:.1f} dB"
        rows.append(
            f"<tr><td><code>{escape(item.name)}</code></td><td>{escape(item.forms[0])}</td>"
            f"<td>{escape(item.forms[1])}</td>"
            f"<td class='n' data-v='{item.bytes[1]}'>{size(item.bytes[1])}</td>"
            f"<td class='n' data-v='{d.relative:.6g}'>{d.relative:.4f}</td>"
            f"<td class='n' data-v='{min(d.snr, 999):.3f}'>{snr}</td>"
            f"<td class='n' data-v='{d.largest:.6g}'>{d.largest:.4g}</td></tr>"
        )
    head = "".join(f"<th class='{cls}'>{name}</th>" for name, cls in heads)
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}"
        "</tbody></table></div>"
    )
