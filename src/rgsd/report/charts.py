"""Charts as inline SVG, for a page that loads nothing. Colors are CSS classes, which follow the page's theme.

Charts as wide as the page use percentages as horizontal coordinates, so their text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 26.0
"""Margins of a line chart, in its own units, which are about CSS pixels."""
BINS = 24
"""Bars of a histogram."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line with its name, its points, and the number of its color; with `marked`, the x of a point that gets a ring,
    and `mark`, what that point is."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    marked: float | None = None
    mark: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """Format a number for an axis or a label: significant digits, thousands separators, a typographic minus sign."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    text = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    if "e" in text:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "\N{MINUS SIGN}")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s for s in (size, 2 * size, 2.5 * size, 5 * size, 10 * size) if s >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def interval_row(
    interval: Mapping[str, float] | None, low: float, high: float, color: int, *, zero: bool = False
) -> Markup:
    """Draw one row of a chart of intervals: a dot with its whisker, on a scale from `low` to `high`.

    Args:
        interval: mean, low and high; None draws nothing.
        low, high: Ends of the scale.
        color: Number of the color.
        zero: Whether to mark zero on the scale.
    """
    if interval is None or not high > low:
        return Markup("")

    def at(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, (value - low) / (high - low))):.2f}%"

    grid = "".join(f'<line class="grid" x1="{at(t)}" x2="{at(t)}" y1="0" y2="100%"/>' for t in ticks(low, high))
    if zero and low < 0 < high:
        grid += f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="0" y2="100%"/>'
    return Markup(
        f'<svg class="interval c{color}" width="100%" height="30" aria-hidden="true">{grid}'
        f'<line class="whisker" x1="{at(interval["low"])}" x2="{at(interval["high"])}" y1="15" y2="15"/>'
        f'<circle class="dot" cx="{at(interval["mean"])}" cy="15" r="5.5"/></svg>'
    )


def interval_axis(low: float, high: float) -> Markup:
    """Draw the scale below such rows."""
    marks = ""
    for t in ticks(low, high):
        share = (t - low) / (high - low)
        anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
        marks += f'<text x="{100 * share:.2f}%" y="12" text-anchor="{anchor}">{escape(number(t))}</text>'
    return Markup(f'<svg class="axis" width="100%" height="16" aria-hidden="true">{marks}</svg>')


def lines(title: str, series: Sequence[Series], *, unit: str = "", percent: bool = False) -> Markup:
    """Draw a small line chart over optimizer steps. Its description gives the first and last value of each line."""
    series = [s for s in (_finite(s) for s in series) if len(s.x)]
    if not series:
        return Markup("")
    all_x = [x for s in series for x in s.x]
    all_y = [y for s in series for y in s.y]
    x_low, x_high = min(all_x), max(all_x)
    y_low, y_high = _span(all_y)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def shown(y: float) -> str:
        return f"{number(100 * y)} %" if percent else number(y)

    parts = []
    for t in ticks(y_low, y_high):
        parts.append(_across(py(t), shown(t)))
    for t in ticks(x_low, x_high, 5):
        if float(t).is_integer():
            parts.append(_below(px(t), HEIGHT, t))
    for s in series:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(s.x, s.y, strict=True))
        parts.append(f'<polyline class="line c{s.color}" points="{points}"/>')
        parts.append(f'<circle class="dot c{s.color}" cx="{px(s.x[-1]):.1f}" cy="{py(s.y[-1]):.1f}" r="3.5"/>')
        if (y := _marked(s)) is not None and s.marked is not None:
            parts.append(f'<circle class="ring c{s.color}" cx="{px(s.marked):.1f}" cy="{py(y):.1f}" r="7"/>')
    ends = "; ".join(
        f"{s.name}: {shown(s.y[0])} at step {number(s.x[0], 6)}, {shown(s.y[-1])} at step {number(s.x[-1], 6)}"
        + ("" if (y := _marked(s)) is None else f"; {s.mark}: {shown(y)} at step {number(s.marked, 6)}")
        for s in series
    )
    label = escape(f"{title}{f' in {unit}' if unit else ''}. {ends}")
    return _svg("chart", WIDTH, HEIGHT, label, parts)


def histograms(groups: Sequence[tuple[str, Sequence[float], int]], *, unit: str) -> list[tuple[str, Markup]]:
    """Draw a histogram of each group, all on one scale.

    Args:
        groups: Name, values of at least 0, and color of each group.
        unit: The unit of the values.

    Returns:
        Name and chart of each group that has values.
    """
    groups = [g for g in groups if len(g[1])]
    if not groups:
        return []
    top = max(1.0, max(v for _, values, _ in groups for v in values) * 1.02)
    counted = [(name, _counts(values, top), color) for name, values, color in groups]
    highest = max(max(c) for _, c, _ in counted)

    def px(x: float) -> float:
        return LEFT + x / top * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y / highest * (HEIGHT - TOP - BOTTOM)

    frame = [_across(py(t), number(t)) for t in ticks(0, highest) if float(t).is_integer()]
    frame += [_below(px(t), HEIGHT, t) for t in ticks(0, top, 5)]
    histograms = []
    for name, counts, color in counted:
        path = f"M{px(0):.1f} {py(0):.1f}"
        for i, n in enumerate(counts):
            path += f" V{py(n):.1f} H{px((i + 1) * top / BINS):.1f}"
        area = f'<path class="area c{color}" d="{path} V{py(0):.1f} Z"/>'
        median = sorted(next(v for n, v, _ in groups if n == name))[sum(counts) // 2]
        label = escape(f"{name}: prompts by {unit} of the response, median {number(median, 6)}")
        histograms.append((name, _svg("chart", WIDTH, HEIGHT, label, [*frame, area])))
    return histograms


def won_lost(won: int, lost: int, most: int) -> Markup:
    """Draw two bars from the middle: lost to the left and won to the right, each on a scale up to `most`."""
    if most <= 0:
        return Markup("")
    left, right = 50 * lost / most, 50 * won / most
    return Markup(
        '<svg class="wonlost" width="100%" height="16" aria-hidden="true">'
        f'<rect class="lost" x="{50 - left:.2f}%" width="{left:.2f}%" y="2" height="12" rx="2"/>'
        f'<rect class="won" x="50%" width="{right:.2f}%" y="2" height="12" rx="2"/>'
        '<line class="zero" x1="50%" x2="50%" y1="0" y2="16"/></svg>'
    )


def _svg(kind: str, width: float, height: float, label: Markup, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _across(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _below(x: float, height: float, value: float) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{escape(number(value, 6))}</text>'


def _finite(s: Series) -> Series:
    kept = [(x, y) for x, y in zip(s.x, s.y, strict=True) if y is not None and math.isfinite(y)]
    return Series(s.name, [x for x, _ in kept], [y for _, y in kept], s.color, s.marked, s.mark)


def _marked(s: Series) -> float | None:
    """The y of the marked point; None without one."""
    return next((y for x, y in zip(s.x, s.y, strict=True) if x == s.marked), None)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of the vertical axis: from zero if the values come close to it, otherwise with a small margin."""
    low, high = min(values), max(values)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if high == low:
        pad = abs(high) * 0.1 or 1.0
        return (low - pad if low else 0.0), high + pad
    room = 0.06 * (high - low)
    return (low if low == 0 else low - room), high + room


def _counts(values: Sequence[float], top: float) -> list[int]:
    counts = [0] * BINS
    for v in values:
        counts[min(BINS - 1, max(0, int(v / top * BINS)))] += 1
    return counts
