"""Arrivals, workloads, records and reports."""

import json

import numpy as np
import pytest

from kvmesh.bench import arrivals, plots, workloads
from kvmesh.bench.records import Record
from kvmesh.bench.report import Report, Slo, comparison, summarise, table
from kvmesh.bench.workloads import Ask, Length
from kvmesh.errors import InvalidArgument


def test_arrivals():
    times = arrivals.poisson(5.0, 4000, seed=1)
    gaps = np.diff(times)
    assert times == sorted(times) and times == arrivals.poisson(5.0, 4000, seed=1) != arrivals.poisson(5.0, 4000, 2)
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.06) and np.std(gaps) == pytest.approx(0.2, rel=0.1)
    assert arrivals.constant(4, 3) == [0, 0.25, 0.5]
    asks = [workloads.Ask(1, 1, ((0, 1),), at) for at in (0.0, 3.0)]
    assert arrivals.traced(asks, speed=2) == [0, 1.5]
    for call in (lambda: arrivals.poisson(0, 1), lambda: arrivals.constant(-1, 2), lambda: arrivals.traced(asks, 0)):
        with pytest.raises(InvalidArgument):
            call()


def test_synthetic_prompts_share_prefixes_and_nothing_else():
    asks = workloads.synthetic(40, Length(300, 0.2), Length(20), seed=3, prefix_tokens=100, prefixes=2)
    prompts = [ask.tokens(1000) for ask in asks]
    assert [len(p) for p in prompts] == [a.prompt_tokens for a in asks]
    assert len({len(p) for p in prompts}) > 5 and {a.max_new_tokens for a in asks} == {20}
    assert len({tuple(p[:100]) for p in prompts}) == 2 and len({tuple(p[100:110]) for p in prompts}) == 40
    assert min(min(p) for p in prompts) >= 3 and max(max(p) for p in prompts) < 1000
    assert prompts == [
        a.tokens(1000)
        for a in workloads.synthetic(40, Length(300, 0.2), Length(20), seed=3, prefix_tokens=100, prefixes=2)
    ]
    assert workloads.synthetic(1, Length(50), Length(1), seed=4)[0].tokens(1000) != asks[0].tokens(1000)[:50]
    with pytest.raises(InvalidArgument, match="prefix_tokens"):
        workloads.synthetic(1, Length(50), Length(1), prefix_tokens=50)


def test_mooncake(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 27000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]},
        {"timestamp": 30000, "input_length": 1024, "output_length": 0, "hash_ids": [0, 1]},
        {"timestamp": 31500, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    a, b, c = workloads.mooncake(path)
    assert [x.at for x in (a, b, c)] == [0.0, 3.0, 4.5] and b.max_new_tokens == 1
    one, two, three = (x.tokens(5000) for x in (a, b, c))
    assert (len(one), len(two), len(three)) == (1100, 1024, 600)
    assert one[:1024] == two and three[:512] == one[:512] and three[512:] != one[512:600]
    assert len(workloads.mooncake(path, count=2)) == 2
    path.write_text('{"timestamp": 1, "input_length": 2000, "output_length": 1, "hash_ids": [0]}')
    with pytest.raises(InvalidArgument, match="line 1"):
        workloads.mooncake(path)
    path.write_text("nonsense")
    with pytest.raises(InvalidArgument, match="line 1"):
        workloads.mooncake(path)


def test_a_trace_begins_again_with_other_prompts():
    seeds = []

    def read(again, most):
        seeds.append(again)
        asks = [Ask(10, 1, ((10 * again + i, 10),), at=2.0 * i) for i in range(4)]
        return asks[: most or 4]

    assert [a.at for a in workloads.repeated(read, 0)] == [0, 2, 4, 6]
    asks = workloads.repeated(read, 10)
    assert [a.at for a in asks] == pytest.approx([0, 2, 4, 6, 7.5, 9.5, 11.5, 13.5, 15, 17])
    assert len({a.blocks for a in asks}) == 10 and seeds == [0, 0, 1, 2]


def test_azure_and_sharegpt(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:05.2319600,31,8\n"
    )
    asks = workloads.azure(path)
    assert [(a.prompt_tokens, a.max_new_tokens) for a in asks] == [(4808, 10), (31, 8)]
    assert asks[1].at == pytest.approx(1.252, abs=0.001)
    path.write_text("TIMESTAMP,ContextTokens\nnever,1\n")
    with pytest.raises(InvalidArgument, match="line 2"):
        workloads.azure(path)
    path = tmp_path / "s.json"
    turns = [("human", "a" * 400), ("gpt", "b" * 200), ("human", "c" * 40), ("gpt", "d" * 80)]
    path.write_text(json.dumps([{"conversations": [{"from": f, "value": v} for f, v in turns]}]))
    first, second = workloads.sharegpt(path)
    assert (first.prompt_tokens, first.max_new_tokens) == (100, 50)
    assert (second.prompt_tokens, second.max_new_tokens) == (160, 20)
    assert second.tokens(500)[:100] == first.tokens(500) and first.session == second.session
    assert second.text.startswith(first.text)
    assert [len(workloads.limited([first, second], n)) for n in (100, 150, 180)] == [0, 1, 2]
    path.write_text("{}")
    with pytest.raises(InvalidArgument, match="ShareGPT"):
        workloads.sharegpt(path)


def record(number, due, first, gaps, **fields):
    tokens, at = [(due + first, 1)], due + first
    for gap in gaps:
        at += gap
        tokens.append((at, 1))
    return Record(number, 100, due, due, at, tokens, **fields)


def test_a_report_is_what_the_records_say(tmp_path):
    records = [record(i, 10.0 + i, 0.1 * (i + 1), [0.02] * 9, cached_tokens=25) for i in range(10)]
    records.append(Record(10, 100, 20.0, 20.0, 20.5, error="UNAVAILABLE: gone"))
    report = summarise("x", records, warmup=2, slo=Slo(ttft=0.6, tpot=0.03))
    assert (report.requests, report.failed, report.errors) == (9, 1, {"UNAVAILABLE: gone": 1})
    assert report.seconds == pytest.approx(20.5 - 12)
    assert report.times["ttft"]["mean"] == pytest.approx(np.mean([0.1 * i for i in range(3, 11)]))
    assert report.times["tpot"]["p99"] == pytest.approx(0.02) and report.times["itl"]["p50"] == pytest.approx(0.02)
    assert report.times["jct"]["p50"] == pytest.approx(0.65 + 0.18)
    assert report.goodput == pytest.approx(4 / 8.5) and report.good_share == pytest.approx(4 / 9)
    assert report.hit_rate == 0.25 and report.tokens_per_second == pytest.approx(80 / 8.5)
    text = table(report)
    assert "9 requests in 8.5 s, 1 failed" in text and "TTFT ≤ 600 ms" in text and "25.0 %" in text
    path = tmp_path / "r.json"
    path.write_text(report.json())
    again = Report.read(path)
    assert again == report
    slower = summarise("y", [record(0, 0.0, 1.3, [0.04] * 9)])
    lines = comparison([again, slower]).splitlines()
    ttft = next(line for line in lines if line.startswith("TTFT ms mean"))
    assert ttft.split()[3:] == ["650.0", "1300.0", "(+100", "%)"]
    one, two = ([record(i, 0.0, f, [0.01]) for i, f in enumerate(fs)] for fs in ((0.1, 0.3, 0.2), (0.5, 0.9, 0.7)))
    lines = comparison([summarise("a", one), summarise("b", two)]).splitlines()
    assert lines[-2].split() == ["TTFT", "correlation", "1.00", "1.00"]
    assert "nan" in comparison([again, slower]).splitlines()[-1]
    assert slower.hit_rate is None and "not told" in table(slower)
    with pytest.raises(InvalidArgument, match="warm-up"):
        summarise("z", records, warmup=99)
    path.write_text("{}")
    with pytest.raises(InvalidArgument, match="no report"):
        Report.read(path)


def test_tokens_of_one_message_are_spread_over_its_time():
    r = Record(0, 5, 1.0, 1.0, 2.2, [(1.4, 1), (2.2, 4)])
    assert r.completion_tokens == 5 and r.tpot == pytest.approx(0.2)
    between, counts = r.gaps
    assert between == pytest.approx([0.2] * len(counts)) and sum(counts) == 4


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    report = summarise("x", [record(i, float(i), 0.1, [0.02] * 3) for i in range(5)])
    plots.distributions([report, report], tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    panels = {"a": {"one": [(1.0, 2.0), (2.0, 3.0)], "published one": [(1.0, 2.5)]}}
    plots.curves(panels, "rate", tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text()
    with pytest.raises(InvalidArgument, match=r"\.png"):
        plots.check(tmp_path / "c.jpeg")
