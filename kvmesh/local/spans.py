"""Finds one request's spans in the local span files."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from kvmesh.config import home
from kvmesh.local.state import meshes

REQUEST_ID = "kvmesh.request_id"


@dataclasses.dataclass(frozen=True)
class Span:
    """One finished span. Times are milliseconds since the epoch."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    instance: str
    start: float
    end: float
    error: str
    attributes: dict[str, Any]
    # (time, name, attributes)
    events: tuple[tuple[float, str, dict[str, Any]], ...] = ()

    @staticmethod
    def parse(line: bytes) -> Span | None:
        """The span on a line of OpenTelemetry's JSON; None for a line that is cut off or something else."""
        try:
            raw = json.loads(line)
            status, resource = raw.get("status") or {}, (raw.get("resource") or {}).get("attributes") or {}
            failed = status.get("status_code") == "ERROR"
            return Span(
                trace_id=raw["context"]["trace_id"].removeprefix("0x"),
                span_id=raw["context"]["span_id"],
                parent_id=raw.get("parent_id") or "",
                name=raw["name"],
                instance=str(resource.get("service.instance.id", "?")),
                start=_milliseconds(raw["start_time"]),
                end=_milliseconds(raw["end_time"]),
                error=(status.get("description") or "failed") if failed else "",
                attributes=dict(raw.get("attributes") or {}),
                events=tuple(
                    (_milliseconds(e["timestamp"]), str(e["name"]), dict(e.get("attributes") or {}))
                    for e in raw.get("events") or ()
                ),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _milliseconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() * 1000


def trace_folders() -> list[Path]:
    """Where spans may be: the default folder, and that of every local mesh."""
    return [home() / "traces", *(place.traces for place in meshes())]


def span_files(folders: Iterable[Path]) -> list[Path]:
    """All span files, the newest first."""
    dated: list[tuple[float, Path]] = []
    for folder in folders:
        for path in folder.glob("*.jsonl*"):
            try:
                dated.append((path.stat().st_mtime, path))
            except FileNotFoundError:
                continue
    return [path for _, path in sorted(dated, reverse=True)]


def find_trace(request_id: str, folders: Iterable[Path]) -> list[Span]:
    """All spans of the newest trace with a span of that kvmesh.request_id; empty when there is none."""
    files = span_files(folders)
    best: Span | None = None
    for span in _spans_with(request_id, files):
        if span.attributes.get(REQUEST_ID) == request_id and (best is None or span.start > best.start):
            best = span
    if best is None:
        return []
    found = {s.span_id: s for s in _spans_with(best.trace_id, files) if s.trace_id == best.trace_id}
    return sorted(found.values(), key=lambda s: (s.start, -s.end))


def _spans_with(text: str, files: Iterable[Path]) -> Iterator[Span]:
    """Spans on lines that contain `text`; files are read line by line."""
    needle = json.dumps(text)[1:-1].encode()
    for path in files:
        try:
            with open(path, "rb") as f:
                for line in f:
                    if needle in line and (span := Span.parse(line)) is not None:
                        yield span
        except FileNotFoundError:
            # Rotated away meanwhile.
            continue


def settled_trace(request_id: str, folders: Sequence[Path], patience: float = 2.0, settle: float = 1.0) -> list[Span]:
    """As find_trace, but waits until the last span is `settle` seconds old: processes write their spans a little later.

    Waits `patience` seconds in all.
    """
    deadline = time.monotonic() + patience
    while True:
        spans = find_trace(request_id, folders)
        age = time.time() - max(s.end for s in spans) / 1000 if spans else 0.0
        if (spans and age >= settle) or time.monotonic() >= deadline:
            return spans
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
