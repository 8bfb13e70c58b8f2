"""Charts as SVG text: heat map, lines, bars, histograms. Nothing is fetched, nothing is run.

Colours are CSS variables of the page, so that charts follow its light and dark scheme. Every mark
carries its numbers as a ``<title>``, which browsers show as a tooltip and readers can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["bars", "heatmap", "histogram", "lines", "ramp"]

_LINE = 14
_CELL_WORDS = 52.0
"""Width of a cell that has room for its number."""


def ramp(share: float) -> str:
    """A colour for 0 (good) to 1 (bad): of the page's sequence of steps."""
    return f"var(--ramp-{_step(share)})"


def on(share: float) -> str:
    """The class of words upon such a colour: low, middle or high ones."""
    return ("on-low", "on-middle", "on-high")[min(2, _step(share) * 3 // 8)]


def _step(share: float) -> int:
    return min(8, max(0, round(share * 8)))


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img"'
        f' aria-label="{escape(label)}">' + "".join(body) + "</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", cls: str = "") -> str:
    kind = f' class="{cls}"' if cls else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    value: Callable[[str, str], float | None],
    words: Callable[[float], str],
    *,
    label: str,
) -> str:
    """Cells coloured by the logarithm of ``value(row, column)``; None leaves a gap."""
    found = {(r, c): v for r in rows for c in columns if (v := value(r, c)) is not None and v > 0}
    if not found:
        return ""
    low, high = math.log10(min(found.values())), math.log10(max(found.values()))
    # No drama where all is alike: the scale spans at least a factor of two.
    low, high = _at_least(low, high, math.log10(2.0))
    span = high - low
    left = 8 + 7 * max(len(item) for item in rows)
    wide = max(14.0, min(100.0, 860.0 / max(1, len(columns))))
    tall = 24.0
    body = []
    every = max(1, math.ceil(len(columns) * 22 / 860))
    for j, column in enumerate(columns):
        if j % every == 0:
            body.append(_text(left + (j + 0.5) * wide, 14, column, anchor="middle", cls="tick"))
    for i, row in enumerate(rows):
        y = 22 + i * tall
        body.append(_text(left - 8, y + tall / 2 + 4, row, anchor="end", cls="tick"))
        for j, column in enumerate(columns):
            number = found.get((row, column))
            if number is None:
                continue
            share = (math.log10(number) - low) / span
            body.append(
                f'<rect x="{left + j * wide + 1:g}" y="{y + 1:g}" width="{wide - 2:g}"'
                f' height="{tall - 2:g}" rx="2" fill="{ramp(share)}">'
                f"<title>{escape(f'{row}, layer {column}: {words(number)}')}</title></rect>"
            )
            if wide >= _CELL_WORDS:
                middle = left + (j + 0.5) * wide
                body.append(
                    _text(middle, y + tall / 2 + 4, words(number), anchor="middle", cls=on(share))
                )
    bottom = 22 + len(rows) * tall + 12
    for step in range(9):
        body.append(
            f'<rect x="{left + step * 18:g}" y="{bottom:g}" width="18" height="8"'
            f' fill="{ramp(step / 8)}"/>'
        )
    body.append(_text(left, bottom + 22, words(10**low), cls="tick"))
    body.append(_text(left + 9 * 18, bottom + 22, words(10**high), anchor="end", cls="tick"))
    width = left + len(columns) * wide + 8
    return _svg(max(width, left + 9 * 18 + 60), bottom + 30, body, label)


def _at_least(low: float, high: float, span: float) -> tuple[float, float]:
    """The range, widened about its middle where it is narrower than ``span``."""
    rest = max(0.0, span - (high - low)) / 2
    return low - rest, high + rest


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span a range."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9) * step
    found = []
    while first <= high + 1e-9:
        found.append(round(first, 10))
        first += step
    return found


def lines(
    series: Mapping[str, Sequence[tuple[int, float]]], *, label: str, unit: str, axis: str
) -> str:
    """Values over layers, a line per name, named at its right end."""
    points = [point for values in series.values() for point in values]
    if not points:
        return ""
    xs = [x for x, _ in points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = _at_least(low, high, 3.0)
    margin = (high - low) * 0.08
    low, high = low - margin, high + margin
    left, right, top, bottom = 52.0, 130.0, 12.0, 34.0
    width, height = 900.0, 280.0
    last = max(xs) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * x / last,
            top + (height - top - bottom) * (1 - (y - low) / (high - low)),
        )

    body = []
    for tick in _ticks(low, high):
        _, y = at(0, tick)
        body.append(
            f'<line class="grid" x1="{left:g}" x2="{width - right:g}" y1="{y:g}" y2="{y:g}"/>'
        )
        body.append(_text(left - 8, y + 4, f"{tick:g}", anchor="end", cls="tick"))
    step = max(1, math.ceil((last + 1) / 16))
    for layer in range(0, last + 1, step):
        x, _ = at(layer, low)
        body.append(_text(x, height - 14, str(layer), anchor="middle", cls="tick"))
    body.append(_text((left + width - right) / 2, height + 2, axis, anchor="middle", cls="tick"))
    body.append(_text(4, top + 2, unit, cls="tick"))
    ends = []
    for number, (name, values) in enumerate(series.items()):
        ordered = sorted(values)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in ordered))
        colour = f"var(--series-{number % 8})"
        body.append(f'<polyline class="line" points="{path}" style="stroke:{colour}"/>')
        for layer, value in ordered:
            x, y = at(layer, value)
            title = escape(f"{name}, layer {layer}: {value:.2f} {unit}")
            body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}">'
                f"<title>{title}</title></circle>"
            )
        ends.append((at(*ordered[-1])[1], name, colour))
    ends.sort()
    # Names must not cover each other: each moves down to the first free place, and where they would
    # run out below the axis, the lowest ones up again.
    places, floor = [], top
    for y, _, _ in ends:
        floor = max(y + 4, floor + _LINE)
        places.append(floor)
    ceiling = max(height - bottom + 4, top + _LINE * len(ends))
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - _LINE
    for place, (_, name, colour) in zip(places, ends, strict=True):
        body.append(
            f'<rect x="{width - right + 8:g}" y="{place - 8:g}" width="9" height="9"'
            f' rx="2" style="fill:{colour}"/>'
        )
        body.append(_text(width - right + 22, place, name, cls="name"))
    return _svg(width, max(height + 8, max(places) + 8), body, label)


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]],
    words: Callable[[float], str],
    *,
    label: str,
) -> str:
    """One stacked bar per row; parts of one name share a colour."""
    most = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if most <= 0:
        return ""
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts))
    left, width, tall = 40.0, 900.0, 30.0
    room = width - left - 110
    body = []
    for i, (row, parts) in enumerate(rows):
        y, x = 8 + i * (tall + 12), left
        body.append(_text(left - 10, y + tall / 2 + 4, row, anchor="end", cls="name"))
        for name, value in parts:
            length = room * value / most
            colour = f"var(--series-{names.index(name) % 8})"
            body.append(
                f'<rect x="{x:.1f}" y="{y:g}" width="{max(0.0, length - 1.5):.1f}"'
                f' height="{tall:g}" rx="2" style="fill:{colour}">'
                f"<title>{escape(f'{row}: {name}, {words(value)}')}</title></rect>"
            )
            x += length
        total = sum(value for _, value in parts)
        body.append(_text(x + 8, y + tall / 2 + 4, words(total), cls="name"))
    y, x = 8 + len(rows) * (tall + 12) + 8, left
    for number, name in enumerate(names):
        body.append(
            f'<rect x="{x:g}" y="{y - 9:g}" width="10" height="10" rx="2"'
            f' style="fill:var(--series-{number % 8})"/>'
        )
        body.append(_text(x + 15, y, name, cls="tick"))
        x += 30 + 6.6 * len(name)
    return _svg(width, y + 10, body, label)


def histogram(
    first: Sequence[int], second: Sequence[int], title: str, *, label: str, discrete: bool = False
) -> str:
    """Two distributions over the same bins: the first as an outline, the second filled."""
    width, height, base = 268.0, 118.0, 96.0
    sums = [sum(values) or 1 for values in (first, second)]
    shares = [
        [value / total for value in values]
        for values, total in zip((first, second), sums, strict=True)
    ]
    most = max((value for values in shares for value in values), default=0.0) or 1.0
    body = [_text(2, 11, title, cls="name")]
    for number, values in enumerate(shares):
        if not any(values):
            continue
        step = (width - 4) / len(values)
        heights = [(base - 20) * math.sqrt(value / most) for value in values]
        if number == 1:
            for i, tall in enumerate(heights):
                gap = min(1.0, step * 0.2) if discrete else 0.0
                body.append(
                    f'<rect class="second" x="{2 + i * step:.2f}" y="{base - tall:.2f}"'
                    f' width="{max(0.4, step - gap):.2f}" height="{tall:.2f}">'
                    f"<title>{values[i]:.3%}</title></rect>"
                )
        else:
            points = []
            for i, tall in enumerate(heights):
                points += [
                    f"{2 + i * step:.2f},{base - tall:.2f}",
                    f"{2 + (i + 1) * step:.2f},{base - tall:.2f}",
                ]
            body.append(f'<polyline class="first" points="{" ".join(points)}"/>')
    body.append(f'<line class="axis" x1="2" x2="{width - 2:g}" y1="{base:g}" y2="{base:g}"/>')
    return _svg(width, height, body, label)
