"""Charts: marks lie where the numbers say, and odd numbers draw nothing odd."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgsd.report.charts import Series, histograms, interval_axis, interval_row, lines, number, ticks, won_lost


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_evenly_and_are_few(low, width):
    found = ticks(low, low + width)
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)
    assert len(found) <= 6
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(math.isclose(g, gaps[0], rel_tol=1e-3, abs_tol=1e-9) for g in gaps)


def test_an_interval_stands_where_it_says():
    svg = ET.fromstring(str(interval_row({"mean": 0.5, "low": 0.25, "high": 1.0}, 0, 1, 2)))
    whisker = next(e for e in svg if e.get("class") == "whisker")
    assert (whisker.get("x1"), whisker.get("x2")) == ("25.00%", "100.00%")
    assert next(e for e in svg if e.get("class") == "dot").get("cx") == "50.00%"
    assert interval_row(None, 0, 1, 0) == ""
    assert "zero" in interval_row({"mean": 0, "low": -1, "high": 1}, -1, 1, 0, zero=True)
    assert "zero" not in interval_row({"mean": 0.5, "low": 0.1, "high": 1}, 0, 1, 0, zero=True)


def test_lines_rise_where_values_rise_and_skip_what_is_no_number():
    svg = ET.fromstring(str(lines("x", [Series("a", [1, 2, 3, 4], [0.0, 1.0, math.nan, 4.0], 3)], unit="nats")))
    line = next(e for e in svg if "line c3" in (e.get("class") or ""))
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    assert len(points) == 3
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] > points[1][1] > points[2][1]  # up is smaller
    assert svg.get("aria-label") == "x in nats. a: 0 at step 1, 4 at step 4"


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [-2.0, -2.0], [math.inf, 1.0], [1e-9, 2e-9], [1e12, 2e12]])
def test_odd_values_are_drawn_inside_the_frame(values):
    text = str(lines("x", [Series("<&\"'>", range(len(values)), values)], percent=True))
    svg = ET.fromstring(text)  # well-formed whatever a series is called
    for x, y in (p.split(",") for e in svg if e.get("points") for p in e.get("points").split()):
        assert 0 <= float(x) <= 340
        assert 0 <= float(y) <= 190
    assert "nan" not in text
    assert "inf" not in text


def test_nothing_to_draw_draws_nothing():
    assert lines("x", [Series("a", [], [])]) == ""
    assert lines("x", [Series("a", [1], [math.nan])]) == ""
    assert histograms([("a", [], 0)], unit="tokens") == []
    assert won_lost(0, 0, 0) == ""


def test_histograms_share_their_scale_and_hold_every_value():
    (one, few), (two, many) = histograms([("few", [0, 5, 100], 1), ("many", [100] * 10, 2)], unit="tokens")
    assert (one, two) == ("few", "many")
    assert "median 5" in few
    heights = [float(y) for y in re.findall(r" V([\d.]+) H", str(many))]
    assert min(heights) == 12.0  # ten of ten: the top
    assert min(float(y) for y in re.findall(r" V([\d.]+) H", str(few))) > 100  # one of ten


def test_bars_go_left_for_lost_and_right_for_won():
    svg = ET.fromstring(str(won_lost(4, 1, 4)))
    lost, won = (next(e for e in svg if e.get("class") == name) for name in ("lost", "won"))
    assert (lost.get("x"), lost.get("width"), won.get("x"), won.get("width")) == ("37.50%", "12.50%", "50%", "50.00%")


def test_numbers_read_as_people_write_them():
    minus = "\N{MINUS SIGN}"
    assert [number(v) for v in (0, 0.12345, -0.5, 1234.5, math.nan, None)] == [
        "0", "0.123", f"{minus}0.5", "1,234", "\N{EN DASH}", "\N{EN DASH}",
    ]  # fmt: skip
    assert "0.2" in interval_axis(0, 1)
