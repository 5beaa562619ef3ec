"""Charts: numbers stand where they belong, names do not cover each other, nothing of a name is markup."""

import re
from xml.etree import ElementTree

import pytest

from hf_attnpatch import charts
from hf_attnpatch.charts import Bar, Curve


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 10.0, [0, 2.5, 5, 7.5, 10]),
        (2.81, 4.47, [2.5, 3, 3.5, 4, 4.5]),
        (3.0, 3.0, [3.0, 4.0]),
        (-0.2, 0.13, [-0.2, -0.1, 0.0, 0.1, 0.2]),
    ],
)
def test_round_numbers_enclose_both(low, high, wanted):
    found = charts.rounded(low, high)
    assert found[0] <= low <= high <= found[-1]
    if low != high:
        assert found == pytest.approx(wanted)


def test_names_move_apart_and_keep_their_order():
    moved = charts.apart([100.0, 101.0, 300.0, 99.0], 19)
    order = sorted(moved)
    assert all(b - a >= 19 - 1e-3 for a, b in zip(order, order[1:], strict=False))
    assert moved[3] < moved[0] < moved[1] < moved[2] == 300.0


def test_bars_are_as_long_as_their_values():
    drawn = charts.bars(
        "t", [Bar("a", 4.0, "4", "ours"), Bar("b", 1.0, "1", "others"), Bar("c", float("nan"), "-", "ours")], "n"
    )
    svg = ElementTree.fromstring(drawn.svg())
    widths = [float(rect.get("width")) for rect in svg.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    assert widths[2] == 0
    assert svg.get("aria-label") == "t: a 4; b 1; c -. n"


def test_curves_rise_where_values_do():
    chart = charts.lines("t", [Curve("a", [(0, 1.0), (1, 2.0)], "ours")], "n", ticks={0: "0", 1: "1"}, mark=(0.8, "m"))
    points = re.search(r'points="([^"]+)"', chart.body)[1].split()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert x0 < x1
    assert y0 > y1


def test_a_name_is_no_markup_and_a_file_needs_nothing():
    chart = charts.bars('<b>"', [Bar("<script>", 1.0, "&", "ours")], "n")
    for text in (chart.svg(), charts.alone(chart).decode(), charts.beside([chart, chart], chart.alt)):
        assert "<script>" not in text
        ElementTree.fromstring(text)
    assert "var(--ours)" in charts.alone(chart).decode()
    assert "--ours: #d55e00" in charts.alone(chart).decode()
