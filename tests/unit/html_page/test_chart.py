"""Charts: round scales, every value told, nothing that is not finite, nothing unescaped."""

from __future__ import annotations

import math
import random
import re

import pytest

from megatron_k2.html_page.chart import MOST_TOLD, Chart, Line, chart
from megatron_k2.html_page.scale import around, number, thinned, ticks


def drawn(*lines: Line, **others: object) -> str:
    return chart(Chart("loss", "step", "nats/token", lines, **others))  # type: ignore[arg-type]


def test_ticks_are_round_and_within_any_range() -> None:
    source = random.Random(3)
    for _ in range(500):
        low = source.uniform(-1, 1) * 10 ** source.randint(-6, 6)
        high = low + 10 ** source.uniform(-3, 4) * max(abs(low), 1e-6)
        most = source.randint(3, 7)
        found = ticks(low, high, most)
        space = 1e-6 * (high - low)
        assert 1 <= len(found) <= most
        assert all(low - space <= one <= high + space for one in found)
        if len(found) > 1:
            step = found[1] - found[0]
            assert round(step / 10 ** math.floor(math.log10(step * (1 + 1e-9))), 3) in (
                1,
                2,
                2.5,
                5,
            )


def test_an_axis_holds_its_values_and_zero_where_it_is_near() -> None:
    assert around([0.2, 1.0])[0] == 0.0
    low, high = around([5.0, 8.0])
    assert 4 < low < 5 and 8 < high < 9
    assert around([3.0, 3.0]) == (2.7, pytest.approx(3.3)) and around([0.0]) == (0.0, 1.0)
    assert around([5.0, 8.0], floor=0.0)[0] == 0.0


def test_numbers_are_short_and_points_keep_their_ends() -> None:
    said = [number(one) for one in (5.37542, 0.0, 12345.6, 2.1e-7, 3_000_000.0, 1.0, math.nan)]
    assert said == ["5.375", "0", "12,346", "2.1e-07", "3e+06", "1", "not finite"]
    assert thinned(range(1000), 5) == [0, 250, 500, 749, 999]
    assert thinned([1, 2], 5) == [1, 2]


def test_every_point_says_its_value_and_the_numbers_are_there_to_read() -> None:
    page = drawn(Line("training", [(1, 8.5), (2, 6.25)]), Line("held-out", [(2, 6.5)], dotted=True))
    assert "training: 8.5 nats/token at step 1" in page
    assert page.count("<circle") == 3 + 1  # one in the legend
    assert re.search(r"<details><summary>numbers</summary>.*<td>6.25</td>", page)
    assert 'aria-label="loss: training from 8.5 to 6.25 nats/token, step 1 to 2;' in page
    assert "c0" in page and "c1" in page


def test_a_long_curve_is_thinned_and_what_is_not_finite_is_left_out() -> None:
    points = [
        (float(at), math.nan if at == 7 else math.inf if at == 8 else 1.0) for at in range(9000)
    ]
    page = drawn(Line("x", points))
    assert page.count("<circle") == MOST_TOLD and len(page) < 20_000
    assert "nan" not in page and "inf" not in page


def test_nothing_to_draw_says_so() -> None:
    assert "No values." in drawn() and "No values." in drawn(Line("x", [(1, math.nan)]))


def test_names_are_escaped_and_levels_and_bands_are_drawn() -> None:
    evil = '<script>alert("x")</script>'
    line = Line(evil, [(0, 0.5), (1, 0.6)], band=[(0, 0.4, 0.6), (1, 0.5, 0.7)])
    page = drawn(line, levels=[(evil, 0.9)], note=evil)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    assert "<polygon" in page and 'class="level"' in page


def test_points_that_lead_somewhere_are_links_and_not_joined() -> None:
    page = drawn(Line("wrong", [(0, 0.0), (3, 1.0)], links=["#a", "#b"]))
    assert page.count("<a ") == 2 and "<polyline" not in page and 'role="group"' in page
