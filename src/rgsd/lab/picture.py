"""The lab's picture, an SVG file: satisfaction of each arm with its interval, and satisfaction over training time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from markupsafe import escape

from rgsd.lab.measurements import LabResults
from rgsd.report.charts import number, ticks

ROW, TOP, BOTTOM = 22, 16, 40
NAMES, INTERVALS, GAP, SCATTER, RIGHT = 150, 400, 70, 320, 90
"""Widths, from left to right: names, intervals, space for the scatter plot's axis, scatter plot, and its labels."""

# A standalone file cannot use the report's style sheet. White keeps it readable on a dark page.
STYLE = (
    "text { font: 11px system-ui, sans-serif; fill: #1c2228 } .tick { fill: #56606b } .grid { stroke: #dedbd4 } "
    ".whisker { stroke: currentColor; stroke-width: 3; stroke-linecap: round } .dot { fill: currentColor } "
    ".base { color: #66707c } .judged { color: #b45309 } .rgsd { color: #0f766e }"
)


def picture(results: LabResults) -> str:
    """Draw the picture."""
    height = TOP + max(9, len(results.arms)) * ROW + BOTTOM
    width = NAMES + INTERVALS + GAP + SCATTER + RIGHT
    parts = [*_intervals(results, height - BOTTOM), *_scatter(results, height - BOTTOM)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Satisfaction of each arm, and its training time"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _kind(arm: str) -> str:
    """The class of an arm's color: untrained, trained with a judge, or trained with RGSD."""
    if arm.startswith("base"):
        return "base"
    return "judged" if "grpo" in arm or "judge" in arm else "rgsd"


def _text(x: float, y: float, text: object, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, x2: float, y1: float, y2: float, kind: str = "grid") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _intervals(results: LabResults, bottom: float) -> Iterator[str]:
    means = {arm: results.mean(arm) for arm in results.arms}
    low, high = min(0.0, *(m.low for m in means.values())), max(1.0, *(m.high for m in means.values()))

    def px(value: float) -> float:
        return NAMES + INTERVALS * (value - low) / (high - low)

    for t in ticks(low, high, 5):
        yield _line(px(t), px(t), TOP, bottom) + _text(px(t), bottom + 16, number(t), "middle")
    yield _text(NAMES + INTERVALS / 2, bottom + 33, f"{results.split} rubric satisfaction, 95 % interval", "middle")
    for row, (arm, mean) in enumerate(means.items()):
        y = TOP + (row + 0.5) * ROW
        yield _text(NAMES - 10, y + 4, arm, "end", "name")
        dot = (
            f'<circle class="dot" cx="{px(mean.mean):.1f}" cy="{y:.1f}" r="4.5"><title>{mean.mean:.3f}</title></circle>'
        )
        yield f'<g class="{_kind(arm)}">{_line(px(mean.low), px(mean.high), y, y, "whisker")}{dot}</g>'


def _scatter(results: LabResults, bottom: float) -> Iterator[str]:
    points = {arm: (results.cost(arm, "seconds"), results.mean(arm).mean) for arm in results.arms}
    points = {arm: point for arm, point in points.items() if point[0] > 0}
    if not points:
        return
    left = NAMES + INTERVALS + GAP
    # Powers of two: training times differ by a factor of ten at most, so powers of ten would leave one tick.
    low = math.floor(math.log2(min(s for s, _ in points.values())))
    high = max(low + 1, math.ceil(math.log2(max(s for s, _ in points.values()))))
    top = max(1.0, *(v for _, v in points.values())) if len(points) > 1 else 1.0

    def px(seconds: float) -> float:
        return left + SCATTER * (math.log2(seconds) - low) / (high - low)

    def py(value: float) -> float:
        return bottom - (bottom - TOP) * max(0.0, value) / top

    for power in range(low, high + 1):
        yield _line(px(2.0**power), px(2.0**power), TOP, bottom)
        yield _text(px(2.0**power), bottom + 16, number(2.0**power), "middle")
    for t in ticks(0, top, 5):
        yield _line(left, left + SCATTER, py(t), py(t)) + _text(left - 8, py(t) + 4, number(t), "end")
    yield _text(left + SCATTER / 2, bottom + 33, "seconds of training (log scale)", "middle")
    for arm, (seconds, value) in points.items():
        yield f'<g class="{_kind(arm)}"><circle class="dot" cx="{px(seconds):.1f}" cy="{py(value):.1f}" r="4.5"/></g>'
        yield _text(px(seconds) + 8, py(value) - 4, arm, kind="name")
