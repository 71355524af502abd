"""The published comparison of strategies, run on the simulator and set beside the published values.

    python -m benchmarks.figures --out FOLDER [--also STRATEGY]... [--requests N] [--seeds N]

Two engines of Llama-3.1-70B FP8 TP4, 3,000 tokens in and 100 out, 100 requests after 40 of warm-up at each rate: "A
System for Microserving of LLMs", arXiv 2412.12488. The published values were read off its figure, within about 5 %.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from kvmesh.bench import arrivals, plots
from kvmesh.bench.report import Report, summarise
from kvmesh.bench.run import Load
from kvmesh.bench.workloads import Length, synthetic
from kvmesh.sim.profile import load_profile
from simulator.mesh import Around
from simulator.run import Choice, simulate

PROFILE = "llama-3.1-70b-fp8-tp4-h100"
RATES = (1.6, 2.4, 3.2, 4.0, 4.8, 5.6)
WARMUP, COUNTED = 40, 100
# A call between router and engine, one way, in seconds: theirs are REST in Python.
AROUND = Around(latency=0.004)
STRATEGIES = {
    "data parallel": "data_parallel",
    "1P1D": "prefill_decode",
    "balanced 0.1": "balanced_prefill_decode,ratio=0.1",
}
# (measure, statistic): by curve, seconds at the rates of PUBLISHED_AT.
PUBLISHED_AT = (1.6, 4.8, 5.6)
PUBLISHED = {
    ("ttft", "mean"): {
        "data parallel": (0.22, 0.29, 0.33),
        "1P1D": (0.32, 0.95, 2.8),
        "balanced 0.1": (0.32, 0.68, 1.0),
    },
    ("tpot", "mean"): {
        "data parallel": (0.015, 0.023, 0.026),
        "1P1D": (0.013, 0.0138, 0.014),
        "balanced 0.1": (0.0135, 0.015, 0.0155),
    },
    ("jct", "mean"): {"data parallel": (1.7, 2.6, 2.95), "1P1D": (1.6, 2.35, 4.15), "balanced 0.1": (1.65, 2.2, 2.6)},
    ("jct", "p99"): {"data parallel": (2.5, 4.1, 4.6), "1P1D": (2.1, 3.6, 5.7), "balanced 0.1": (2.1, 3.3, 3.8)},
}
TITLES = {"ttft": "TTFT", "tpot": "TPOT", "jct": "JCT"}
# Two values differ when they are further apart than this, relative to the published one.
DIFFERS = 0.2


@dataclass(frozen=True)
class Points:
    """All runs: reports by (curve, rate), one for each seed."""

    curves: tuple[str, ...]
    reports: dict[tuple[str, float], list[Report]]

    def value(self, curve: str, rate: float, measure: str, statistic: str) -> float:
        """Mean over the seeds, in seconds."""
        return float(np.mean([r.times[measure][statistic] for r in self.reports[curve, rate]]))


def load_at(rate: float, seed: int, counted: int = COUNTED) -> Load:
    """Requests of one point; the same for every strategy."""
    count = WARMUP + counted
    asks = synthetic(count, Length(3000, 0.03), Length(100, 0.1), seed=seed)
    return Load(asks, arrivals.poisson(rate, count, seed), warmup=WARMUP)


def run_all(also: Iterable[str], seeds: int, rates: Sequence[float] = RATES, counted: int = COUNTED) -> Points:
    """Every curve at every rate. Raises InvalidArgument for a strategy that cannot be read."""
    profile = load_profile(PROFILE)
    choices = {**STRATEGIES, **{text: text for text in also}}
    reports: dict[tuple[str, float], list[Report]] = {}
    for curve, text in choices.items():
        for rate in rates:
            runs = (
                simulate(profile, 2, Choice.parse(text), load_at(rate, s, counted), s, AROUND) for s in range(seeds)
            )
            reports[curve, rate] = [summarise(curve, run.records, warmup=WARMUP) for run in runs]
            failed = sum(r.failed for r in reports[curve, rate])
            if failed:
                raise click.ClickException(f"{curve} at {rate}: {failed} requests failed")
        click.echo(f"{curve}: done", err=True)
    return Points(tuple(choices), reports)


def note(points: Points) -> str:
    """The comparison in Markdown: every published value beside ours, and where they differ."""
    lines = [
        "| | curve | " + " | ".join(f"{rate} req/s: ours | published" for rate in PUBLISHED_AT) + " |",
        "|---|---|" + "---|" * (2 * len(PUBLISHED_AT)),
    ]
    differing, near = [], 0
    for (measure, statistic), curves in PUBLISHED.items():
        for curve, values in curves.items():
            cells = []
            for rate, published in zip(PUBLISHED_AT, values, strict=True):
                ours = points.value(curve, rate, measure, statistic)
                off = ours / published - 1
                cells.append(f"{_text(measure, ours)} ({100 * off:+.0f} %) | {_text(measure, published)}")
                if abs(off) > DIFFERS:
                    differing.append(f"- {statistic} {TITLES[measure]} of {curve} at {rate} req/s: {100 * off:+.0f} %")
                else:
                    near += 1
            lines.append(f"| {statistic} {TITLES[measure]} | {curve} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{near} of {near + len(differing)} values are within {100 * DIFFERS:.0f} % of the published ones.",
        "",
    ]
    lines += ["These are not:", "", *differing, ""] if differing else []
    lines += ["Orderings:", "", *(f"- {'yes' if holds else '**no**'}: {what}" for what, holds in orderings(points))]
    also = [curve for curve in points.curves if curve not in STRATEGIES]
    for curve in also:
        lines += ["", *_against(points, curve)]
    return "\n".join(lines) + "\n"


def orderings(points: Points) -> list[tuple[str, bool]]:
    """What the published figure shows, and whether ours does."""
    rates = sorted({rate for _, rate in points.reports})
    low, high = rates[0], rates[-1]

    def at(curve: str, rate: float, measure: str, statistic: str = "mean") -> float:
        return points.value(curve, rate, measure, statistic)

    flat = [at("1P1D", rate, "tpot") for rate in rates]
    best = [min(STRATEGIES, key=lambda c: at(c, rate, "jct", "p99")) == "balanced 0.1" for rate in rates if rate >= 4.8]
    return [
        ("TPOT of 1P1D stays within 15 % of 13 to 14 ms", min(flat) > 0.85 * 0.013 and max(flat) < 1.15 * 0.014),
        (
            "TPOT of data parallel rises by more than half",
            at("data parallel", high, "tpot") > 1.5 * at("data parallel", low, "tpot"),
        ),
        (
            "at the highest rate 1P1D's TTFT is more than 4 times that of data parallel",
            at("1P1D", high, "ttft") > 4 * at("data parallel", high, "ttft"),
        ),
        (
            "at the highest rate 1P1D has a longer JCT than balanced 0.1",
            at("1P1D", high, "jct") > at("balanced 0.1", high, "jct"),
        ),
        ("balanced 0.1 has the lowest P99 JCT at 4.8 and 5.6 requests a second", bool(best) and all(best)),
    ]


def _against(points: Points, curve: str) -> list[str]:
    """One more strategy against the best of the published three, rate by rate."""
    lines = [
        f"`{curve}` against the best of the three, JCT:",
        "",
        "| req/s | mean | best of three | P99 | best of three |",
    ]
    lines.append("|---|---|---|---|---|")
    for rate in sorted({rate for _, rate in points.reports}):
        cells = []
        for statistic in ("mean", "p99"):
            ours = points.value(curve, rate, "jct", statistic)
            name, best = min(
                ((c, points.value(c, rate, "jct", statistic)) for c in STRATEGIES), key=lambda pair: pair[1]
            )
            cells.append(f"{ours:.2f} s ({100 * (ours / best - 1):+.0f} %) | {best:.2f} s, {name}")
        lines.append(f"| {rate} | {' | '.join(cells)} |")
    return lines


def _text(measure: str, seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if measure == "tpot" else f"{seconds:.2f} s"


def draw(points: Points, path: Path) -> None:
    """Mean and P99 of TTFT, TPOT and JCT over the rate; what was published is dashed."""
    rates = sorted({rate for _, rate in points.reports})
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for statistic in ("mean", "p99"):
        for measure, title in TITLES.items():
            unit = 1000.0 if measure == "tpot" else 1.0
            lines = {
                c: [(rate, unit * points.value(c, rate, measure, statistic)) for rate in rates] for c in points.curves
            }
            for curve, values in PUBLISHED.get((measure, statistic), {}).items():
                lines[f"published {curve}"] = [(r, unit * v) for r, v in zip(PUBLISHED_AT, values, strict=True)]
            panels[f"{statistic} {title}, {'ms' if unit > 1 else 's'}"] = lines
    plots.curves(panels, "requests a second", path)


@click.command()
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for what comes out."
)
@click.option(
    "--also",
    multiple=True,
    default=["adaptive"],
    show_default=True,
    metavar="NAME[,KEY=VALUE]...",
    help="One more strategy; may be repeated.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100), help="Runs of each point.")
@click.option(
    "--requests",
    default=COUNTED,
    show_default=True,
    type=click.IntRange(10),
    help="Of a run, after the warm-up; the P99 of few is the slowest one.",
)
@click.option("--no-plot", is_flag=True, help="Without pictures, which need matplotlib.")
def main(out: Path, also: tuple[str, ...], seeds: int, requests: int, no_plot: bool) -> None:
    """Runs the published comparison on the simulator."""
    logging.disable(logging.WARNING)
    if not no_plot:
        plots.check(out / "published.png")
    points = run_all(also, seeds, counted=requests)
    out.mkdir(parents=True, exist_ok=True)
    text = note(points)
    (out / "published.md").write_text(text)
    values = {
        f"{curve} at {rate}": {m: {s: points.value(curve, rate, m, s) for s in ("mean", "p99")} for m in TITLES}
        for curve, rate in points.reports
    }
    (out / "published.json").write_text(json.dumps(values, indent=1) + "\n")
    if not no_plot:
        draw(points, out / "published.png")
        draw(points, out / "published.svg")
    click.echo(text)
    click.echo(f"written to {out}", err=True)


if __name__ == "__main__":
    main()
