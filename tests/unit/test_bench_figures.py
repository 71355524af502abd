"""The published comparison, at three rates, one seed and few requests."""

import math

import pytest

from benchmarks import figures


@pytest.fixture(scope="module")
def points():
    return figures.run_all(["data_parallel,policy=round_robin"], 1, (1.6, 4.8, 5.6), counted=15)


def test_the_note_has_every_published_value_and_says_what_differs(points):
    text = figures.note(points)
    rows = [line for line in text.splitlines() if line.startswith(("| mean", "| p99"))]
    assert len(rows) == 12 and "2.80 s" in text and "26.0 ms" in text
    counted = [line for line in text.splitlines() if "of 36 values are within 20 %" in line]
    assert len(counted) == 1 and text.count("\n- mean") + text.count("\n- p99") == 36 - int(counted[0].split()[0])
    assert int(counted[0].split()[0]) >= 18
    assert "`data_parallel,policy=round_robin` against the best of the three" in text


def test_orderings_are_judged_by_the_values(points):
    found = dict(figures.orderings(points))
    assert len(found) == 5
    assert found["TPOT of 1P1D stays within 15 % of 13 to 14 ms"]
    assert points.value("data parallel", 5.6, "tpot", "mean") > 1.3 * points.value("1P1D", 5.6, "tpot", "mean")
    assert found["at the highest rate 1P1D has a longer JCT than balanced 0.1"]
    same = figures.Points(points.curves, dict.fromkeys(points.reports, points.reports["1P1D", 1.6]))
    assert not dict(figures.orderings(same))["TPOT of data parallel rises by more than half"]


def test_every_strategy_gets_the_same_load():
    one, two = (figures.load_at(3.2, 7) for _ in range(2))
    assert one.times == two.times and one.asks == two.asks and one.times != figures.load_at(3.2, 8).times
    assert len(one.asks) == 140 and one.warmup == 40
    assert math.isclose(sum(a.prompt_tokens for a in one.asks) / 140, 3000, rel_tol=0.02)


def test_the_picture(points, tmp_path):
    pytest.importorskip("matplotlib")
    figures.draw(points, tmp_path / "f.svg")
    assert "published" in (tmp_path / "f.svg").read_text() or (tmp_path / "f.svg").stat().st_size > 10_000
