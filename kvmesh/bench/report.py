"""What a run amounts to: as a table, as JSON, and beside other runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.bench.records import Record, good
from kvmesh.errors import InvalidArgument

# The measures, with their units; times are shown in ms where it says so.
MEASURES = {"ttft": "TTFT ms", "tpot": "TPOT ms", "itl": "inter-token ms", "jct": "JCT ms"}
STATISTICS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good, in seconds; 0 is no limit."""

    ttft: float = 0.0
    tpot: float = 0.0
    jct: float = 0.0

    def kept(self, record: Record) -> bool:
        """Whether the request ended well and in time."""
        limits = (("ttft", self.ttft), ("tpot", self.tpot), ("jct", self.jct))
        return not record.error and all(not limit or getattr(record, name) <= limit for name, limit in limits)

    def __str__(self) -> str:
        limits = (("TTFT", self.ttft), ("TPOT", self.tpot), ("JCT", self.jct))
        return ", ".join(f"{name} ≤ {1000 * limit:g} ms" for name, limit in limits if limit) or "any that ends well"


@dataclass
class Report:
    """One run. `times`: of each of MEASURES, by statistic, in seconds. `about`: what was run, in words."""

    name: str
    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    prompt_tokens_per_second: float
    tokens_per_second: float
    goodput: float
    good_share: float
    slo: dict[str, float]
    hit_rate: float | None
    times: dict[str, dict[str, float]]
    errors: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    # Of each request that ended well, for plots: by measure but itl, in order of sending.
    samples: dict[str, list[float]] = field(default_factory=dict)

    def json(self) -> str:
        """As one JSON object."""
        return json.dumps(self.__dict__, ensure_ascii=False)

    @staticmethod
    def read(path: Path) -> Report:
        """One that was written. Raises InvalidArgument."""
        try:
            return Report(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidArgument(f"{path} is no report of kvmesh bench: {error}") from None


def summarise(
    name: str,
    records: Sequence[Record],
    *,
    warmup: int = 0,
    slo: Slo | None = None,
    about: Mapping[str, Any] | None = None,
) -> Report:
    """Of all records but the first `warmup`. Raises InvalidArgument when none is left."""
    slo = slo or Slo()
    counted = [r for r in records if r.number >= warmup]
    if not counted:
        raise InvalidArgument(f"no request is left after {warmup} of warm-up")
    ended = good(counted)
    seconds = max(max(r.ended for r in counted) - min(r.due for r in counted), 1e-9)
    samples = {m: [getattr(r, m) for r in ended] for m in ("ttft", "tpot", "jct")}
    samples["tpot"] = [r.tpot for r in ended if r.completion_tokens > 1]
    gaps = np.concatenate([np.repeat(*r.gaps) for r in ended] or [np.empty(0)])
    told = [r for r in ended if r.cached_tokens >= 0]
    kept = sum(slo.kept(r) for r in counted)
    errors: dict[str, int] = {}
    for record in counted:
        if record.error:
            errors[record.error[:200]] = errors.get(record.error[:200], 0) + 1
    return Report(
        name=name,
        requests=len(counted),
        failed=len(counted) - len(ended),
        seconds=seconds,
        requests_per_second=len(ended) / seconds,
        prompt_tokens_per_second=sum(r.prompt_tokens for r in ended) / seconds,
        tokens_per_second=sum(r.completion_tokens for r in ended) / seconds,
        goodput=kept / seconds,
        good_share=kept / len(counted),
        slo=dict(slo.__dict__),
        hit_rate=_rate(sum(r.cached_tokens for r in told), sum(r.prompt_tokens for r in told)),
        times={m: statistics(gaps if m == "itl" else samples[m]) for m in MEASURES},
        errors=errors,
        about=dict(about or {}),
        samples={m: [round(v, 6) for v in values] for m, values in samples.items()},
    )


def statistics(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles; zeros of nothing."""
    if not len(values):
        return dict.fromkeys(STATISTICS, 0.0)
    found = np.percentile(values, [50, 90, 99])
    return {"mean": float(np.mean(values)), **{f"p{p}": float(v) for p, v in zip((50, 90, 99), found, strict=True)}}


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def table(report: Report) -> str:
    """One run, for people."""
    slo = Slo(**report.slo)
    hits = "not told" if report.hit_rate is None else f"{100 * report.hit_rate:.1f} % of prompt tokens"
    lines = [
        f"{report.name}: {report.requests} requests in {report.seconds:.1f} s, {report.failed} failed",
        *(f"  {count} x {error}" for error, count in report.errors.items()),
        f"  throughput   {report.requests_per_second:.2f} requests/s, {report.prompt_tokens_per_second:.0f} prompt "
        f"tokens/s, {report.tokens_per_second:.0f} tokens/s",
        f"  goodput      {report.goodput:.2f} requests/s, {100 * report.good_share:.1f} % ({slo})",
        f"  prefix hits  {hits}",
        "  " + f"{'':<16}" + "".join(f"{s:>10}" for s in STATISTICS),
    ]
    for measure, title in MEASURES.items():
        cells = "".join(f"{1000 * report.times[measure][s]:>10.1f}" for s in STATISTICS)
        lines.append(f"  {title:<16}{cells}")
    return "\n".join(lines)


def _correlation(first: Report, other: Report, measure: str) -> float:
    """Of the times of each request in two runs of the same requests; NaN where that cannot be told."""
    a, b = first.samples.get(measure, []), other.samples.get(measure, [])
    same = len(a) == len(b) > 2 and first.about.get("seed") == other.about.get("seed")
    return float(np.corrcoef(a, b)[0, 1]) if same and np.std(a) and np.std(b) else float("nan")


def comparison(reports: Sequence[Report]) -> str:
    """Several runs side by side, each relative to the first; how the times of their requests correlate with its."""
    width = max(14, *(len(r.name) + 2 for r in reports)) + 9
    rows: list[tuple[str, list[float], str]] = [
        ("requests/s", [r.requests_per_second for r in reports], ".2f"),
        ("tokens/s", [r.tokens_per_second for r in reports], ".0f"),
        ("goodput/s", [r.goodput for r in reports], ".2f"),
        ("prefix hits %", [100 * (r.hit_rate or 0.0) for r in reports], ".1f"),
        ("failed", [float(r.failed) for r in reports], ".0f"),
    ]
    for measure, title in MEASURES.items():
        rows += [(f"{title} {s}", [1000 * r.times[measure][s] for r in reports], ".1f") for s in STATISTICS]
    for measure in ("ttft", "jct"):
        rows.append((f"{measure.upper()} correlation", [_correlation(reports[0], r, measure) for r in reports], ".2f"))
    lines = [f"{'':<20}" + "".join(f"{r.name:>{width}}" for r in reports)]
    for title, values, form in rows:
        cells = [f"{value:{form}}" for value in values]
        for i in range(1, len(values)):
            relative = values[0] and "correlation" not in title
            cells[i] += f" ({100 * (values[i] / values[0] - 1):+4.0f} %)" if relative else ""
        lines.append(f"{title:<20}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
