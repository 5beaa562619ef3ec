"""Charts as SVG text: bars and lines in the colours of the page that they stand on, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 520  # of a chart, in units of which a letter is 16 high
LETTER = 9.2  # width of one, about
COLOURS = {  # Okabe and Ito's: name -> on light, on dark
    "ground": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "line": ("#d0d7de", "#3d444d"),
    "ours": ("#d55e00", "#ff9a5c"),
    "best": ("#009e73", "#3fd0a4"),
    "others": ("#8a8a8a", "#8f979f"),
    "original": ("#0072b2", "#56b4e9"),
    "without": ("#444444", "#c8cdd2"),
}
RULES = """.chart text { font: 16px system-ui, sans-serif; fill: var(--text); }
.chart .small { fill: var(--faint); font-size: 14px; }
.chart .title { font-weight: 600; font-size: 17px; }
.chart .axis { stroke: var(--line); stroke-width: 1; }
.chart .curve { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.chart .rule { stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 5 4; }
""" + "".join(
    f".chart .{name}-f {{ fill: var(--{name}); }} .chart .{name}-s {{ stroke: var(--{name}); }}\n"
    for name in ("ours", "best", "others", "original", "without")
)


def variables() -> str:
    """CSS that gives the colours their values, by what the reader's system prefers."""
    light, dark = ("; ".join(f"--{name}: {both[i]}" for name, both in COLOURS.items()) for i in (0, 1))
    return f":root {{ {light}; }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}; }} }}\n"


@dataclass(frozen=True)
class Bar:
    """A value with a name.

    Attributes:
        name: beside the bar.
        value: its length.
        shown: the value as text, behind it.
        colour: of `COLOURS`.
    """

    name: str
    value: float
    shown: str
    colour: str


@dataclass(frozen=True)
class Curve:
    """A line with its name at its end.

    Attributes:
        name: of it.
        points: (x, y), x rising.
        colour: of `COLOURS`.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        body: its SVG elements.
        height: in the units of `WIDTH`.
        alt: what it shows, for those who do not see it.
    """

    body: str
    height: float
    alt: str

    def svg(self) -> str:
        """Return the drawing for a page, which has `RULES` in its style."""
        return _svg(self.body, WIDTH, self.height, self.alt)


def alone(chart: Chart) -> bytes:
    """Return an SVG file of a chart, which needs nothing else; as wide as a column of text."""
    return beside([chart], chart.alt).replace("<svg ", '<svg width="560" ', 1).encode()


def beside(charts: Sequence[Chart], alt: str) -> str:
    """Return an SVG file with the charts side by side, which needs nothing else."""
    gap, margin = 40, 20
    height = max(chart.height for chart in charts) + 2 * margin
    width = len(charts) * WIDTH + (len(charts) - 1) * gap + 2 * margin
    places = (f'<g transform="translate({margin + i * (WIDTH + gap)} {margin})">' for i in range(len(charts)))
    parts = [f"{place}{chart.body}</g>" for place, chart in zip(places, charts, strict=True)]
    style = variables().replace(":root", ".chart") + RULES
    ground = f'<rect width="{width}" height="{height:g}" rx="10" style="fill: var(--ground)"/>'
    return _svg(f"<style>\n{style}</style>\n{ground}" + "\n".join(parts), width, height, alt) + "\n"


def bars(title: str, rows: Sequence[Bar], note: str) -> Chart:
    """Horizontal bars from zero, the first on top; a value that is not finite has no bar.

    Args:
        title: above.
        rows: the bars.
        note: below: what is measured, and its unit.
    """
    named = max(len(row.name) for row in rows) * LETTER + 12
    room = WIDTH - named - max(len(row.shown) for row in rows) * LETTER - 14
    largest = max([row.value for row in rows if math.isfinite(row.value)] + [1e-12])
    parts, y = [_text(0, 18, title, "title")], 34.0
    for row in rows:
        length = max(room * row.value / largest, 0.0) if math.isfinite(row.value) else 0.0
        parts.append(_text(named - 8, y + 18, row.name, anchor="end"))
        parts.append(f'<rect class="{row.colour}-f" x="{named:g}" y="{y:g}" width="{length:.1f}" height="24" rx="2"/>')
        parts.append(_text(named + length + 7, y + 18, row.shown))
        y += 34
    parts.append(_text(0, y + 14, note, "small"))
    said = "; ".join(f"{row.name} {row.shown}" for row in rows)
    return Chart("\n".join(parts), y + 22, f"{title}: {said}. {note}")


def lines(
    title: str,
    curves: Sequence[Curve],
    note: str,
    *,
    ticks: Mapping[float, str],
    mark: tuple[float, str] | None = None,
    level: tuple[float, str] | None = None,
    height: float = 250,
) -> Chart:
    """Lines with their names at their ends.

    Args:
        title: above.
        curves: the lines.
        note: below: what the axes measure, and their units.
        ticks: x -> its label.
        mark: an x to draw a vertical rule at, and what it says.
        level: a y to draw a horizontal rule at, and what it says.
        height: of the axes.
    """
    values = [y for curve in curves for _, y in curve.points] + ([level[0]] if level else [])
    steps = rounded(min(values), max(values))
    left, top, right = 44.0, 40.0, max(len(curve.name) for curve in curves) * LETTER + 10
    low, high = steps[0], steps[-1]
    first, last = min(ticks), max(ticks)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        return left + across * (WIDTH - left - right), top + (high - y) / ((high - low) or 1) * height

    parts = [_text(0, 18, title, "title")]
    for step in steps:
        y = at(first, step)[1]
        parts.append(f'<line class="axis" x1="{left:g}" x2="{WIDTH - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 5, f"{step:.10g}", "small", "end"))
    for x, label in ticks.items():
        parts.append(_text(at(x, low)[0], top + height + 20, label, "small", "middle"))
    if mark is not None:
        x = at(mark[0], low)[0]
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{top + height:g}"/>')
        right_of = x < WIDTH / 2
        parts.append(_text(x + (6 if right_of else -6), top + 14, mark[1], "small", "start" if right_of else "end"))
    if level is not None:
        y = at(first, level[0])[1]
        parts.append(f'<line class="rule" x1="{left:g}" x2="{WIDTH - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left + 6, y - 7, level[1], "small"))
    ends = apart([at(*curve.points[-1])[1] for curve in curves], 19)
    for curve, end in zip(curves, ends, strict=True):
        places = [at(*point) for point in curve.points]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="curve {curve.colour}-s" points="{drawn}"/>')
        parts += [f'<circle class="{curve.colour}-f" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
        parts.append(_text(places[-1][0] + 10, end + 5, curve.name))
    parts.append(_text(0, top + height + 46, note, "small"))
    said = "; ".join(f"{c.name} from {c.points[0][1]:.2f} to {c.points[-1][1]:.2f}" for c in curves)
    return Chart("\n".join(parts), top + height + 54, f"{title}: {said}. {note}")


def rounded(low: float, high: float, count: int = 4) -> list[float]:
    """About so many round numbers, evenly apart, of which the first and the last enclose both values."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if span / (power * each) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def apart(places: Sequence[float], least: float) -> list[float]:
    """Move places that are closer than `least` away from each other, in their order."""
    moved = list(places)
    for _ in range(50):
        close = False
        order = sorted(range(len(moved)), key=lambda i: (moved[i], i))
        for a, b in pairwise(order):
            lacking = least - (moved[b] - moved[a])
            if lacking > 1e-6:
                moved[a] -= lacking / 2
                moved[b] += lacking / 2
                close = True
        if not close:
            break
    return moved


def _text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    classes = f' class="{kind}"' if kind else ""
    return f'<text{classes} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _svg(body: str, width: float, height: float, alt: str) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(alt, quote=True)}">\n{body}\n</svg>'
    )
