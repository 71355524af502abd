"""The waterfall: order of spans, bars to scale, nothing lost on narrow or wide terminals."""

import dataclasses
import io

import pytest
from rich.console import Console

from kvmesh.local.spans import Span
from kvmesh.local.waterfall import Waterfall, human_bytes, tree

T0 = 1_790_000_000_000.0


def span(id: str, parent: str, name: str, start: float, end: float, instance: str = "router", error: str = "", **attrs):
    attributes = {k.replace("__", "."): v for k, v in attrs.items()}
    return Span("t", id, parent, name, instance, T0 + start, T0 + end, error, attributes)


def lines(spans, width: int = 120) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, color_system=None).print(Waterfall(spans))
    return out.getvalue().splitlines()


REQUEST = [
    span("c", "b", "prefill", 20, 60, "engine-0", kvmesh__tokens=799),
    span("a", "", "request", 0, 100, kvmesh__request_id="r-1", gen_ai__usage__input_tokens=800),
    span("d", "a", "kvmesh.v1.Engine/StartGenerate", 62, 100, "engine-1"),
    span(
        "b",
        "a",
        "remote_send",
        10,
        61,
        kvmesh__sent_bytes=818176,
        kvmesh__transport="shm",
        kvmesh__ratio=0.123456,
        kvmesh__queue_s=0.00123,
    ),
]


def test_children_stand_below_their_parent_by_start():
    assert [(d, s.span_id) for d, s in tree(REQUEST)] == [(0, "a"), (1, "b"), (2, "c"), (1, "d")]


def test_a_span_of_unknown_parent_or_that_is_its_own_is_not_lost():
    spans = [span("a", "gone", "x", 5, 6), span("b", "b", "y", 1, 2), span("c", "a", "z", 5, 6)]
    assert [(d, s.span_id) for d, s in tree(spans)] == [(0, "b"), (0, "a"), (1, "c")]


def test_of_two_that_start_together_the_longer_comes_first():
    assert [s.span_id for _, s in tree([span("a", "", "x", 0, 1), span("b", "", "y", 0, 9)])] == ["b", "a"]


@pytest.mark.parametrize("width", [60, 100, 120, 200])
def test_every_span_has_its_line_with_times_and_no_line_is_too_wide(width):
    shown = lines(REQUEST, width)
    assert max(map(len, shown)) <= width
    assert shown[0].split() == ["span", "where", "at", "ms", "took", "ms"]
    for name, instance, at, took in (
        ("request", "router", "0.0", "100.0"),
        ("  remote_send", "router", "10.0", "51.0"),
        ("    prefill", "engine-0", "20.0", "40.0"),
    ):
        (line,) = [text for text in shown if text.startswith(name + " ")]
        assert line.split()[1:4] == [instance, at, took]


def test_details_are_short_and_people_can_read_them():
    text = "\n".join(lines(REQUEST, 200))
    assert "sent_bytes=799.0 KiB  transport=shm  ratio=0.1235  queue=1.2ms" in text
    assert "usage.input_tokens=800" in text and "tokens=799" in text
    assert "r-1" not in text and "kvmesh.sent" not in text


def test_on_a_narrow_terminal_details_stand_below():
    shown = lines(REQUEST, 100)
    at = next(i for i, line in enumerate(shown) if line.startswith("  remote_send"))
    assert shown[at + 1].strip().startswith("sent_bytes=799.0 KiB") and shown[at + 1].startswith("    ")
    wide = lines(REQUEST, 200)
    assert len(wide) == 5 and len(shown) > 5


def test_details_that_are_too_long_go_on_in_the_next_line():
    attributes = {f"key{i}": "v" * 10 for i in range(20)}
    for width in (100, 200):
        shown = lines([span("a", "", "x", 0, 5, **attributes)], width)
        assert "".join(shown).count("v" * 10) == 20 and max(map(len, shown)) <= width and len(shown) > 2


def test_bars_are_to_scale_and_in_their_place():
    shown = lines([span("a", "", "all", 0, 100), span("b", "a", "half", 50, 100), span("c", "a", "none", 50, 50)], 120)
    width = shown[1].count("█")
    assert width >= 20
    begin = shown[1].index("█")
    assert shown[2].count("█") == pytest.approx(width / 2, abs=1)
    assert shown[2].index("█") == pytest.approx(begin + width / 2, abs=1)
    assert shown[2].rstrip().endswith("█") and len(shown[2].rstrip()) == len(shown[1].rstrip())
    assert "▏" in shown[3] and shown[3].index("▏") == pytest.approx(begin + width / 2, abs=1)


def test_a_trace_of_no_length_is_drawn():
    assert any("▏" in line for line in lines([span("a", "", "x", 0, 0)]))
    assert lines([]) == []


def test_an_error_is_shown_with_its_kind():
    shown = lines([span("a", "", "x", 0, 5, error="no room", error__type="RESOURCE_EXHAUSTED", n=3)], 200)
    assert "RESOURCE_EXHAUSTED: no room" in shown[1] and "n=3" not in shown[1]


def test_events_are_told_with_their_time_and_reason():
    there = span("a", "", "x", 0, 5, "e", "", n=1)
    event = (T0 + 2.5, "ticket_refused", {"kvmesh.reason": "it has expired"})
    (line,) = lines([dataclasses.replace(there, events=(event,))], 200)[1:]
    assert line.rstrip().endswith("n=1  ticket_refused@2.5ms (reason=it has expired)")


def test_names_and_values_are_never_markup():
    text = "\n".join(lines([span("a", "", "[bold]x[/bold]", 0, 5, note="[red]y[/red]")], 200))
    assert "[bold]x[/bold]" in text and "note=[red]y[/red]" in text


def test_long_names_are_cut_and_say_so():
    shown = lines([span("a", "", "x" * 300, 0, 5, "i" * 100)], 100)
    assert max(map(len, shown)) <= 100 and "…" in shown[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3250586, "3.1 MiB"),
        (5 << 30, "5.0 GiB"),
        (9 << 40, "9216.0 GiB"),
    ],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text
