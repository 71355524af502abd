"""Spans: where they go, how they hang together, and that nothing waits for them."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.trace import Span, set_span_in_context

from kvmesh import __version__
from kvmesh.config import TraceConfig
from kvmesh.errors import Cancelled, DeadlineExceeded
from kvmesh.local.spans import Span as FileSpan
from kvmesh.spanfile import SpanFile
from kvmesh.telemetry import Telemetry, extract, fail, inject, now_ns, record_span


def spans(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.jsonl*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def telemetry(folder: Path, instance: str = "e0", **settings: Any) -> Telemetry:
    return Telemetry("engine", instance, TraceConfig(trace_dir=str(folder), **settings))


def test_spans_are_written_at_close_one_a_line_as_the_reader_wants_them(tmp_path):
    t = telemetry(tmp_path / "traces")
    assert not (tmp_path / "traces").exists()
    parent = t.tracer.start_span("request", attributes={"kvmesh.request_id": "r1"})
    child = t.tracer.start_span("prefill", context=set_span_in_context(parent))
    child.end()
    parent.end()
    t.close()
    t.close()
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name == "e0.jsonl"
    first, second = (FileSpan.parse(line) for line in file.read_bytes().splitlines())
    assert first is not None and second is not None
    assert (first.name, second.name, first.instance) == ("prefill", "request", "e0")
    assert first.parent_id == second.span_id and second.parent_id == "" and first.trace_id == second.trace_id
    assert second.attributes["kvmesh.request_id"] == "r1" and 0 <= first.end - first.start < 1000
    resource = spans(tmp_path / "traces")[0]["resource"]["attributes"]
    assert resource["service.name"] == "kvmesh.engine" and resource["service.version"] == __version__


def test_spans_are_written_soon_also_without_close(tmp_path):
    t = telemetry(tmp_path)
    t.tracer.start_span("one").end()
    deadline = time.monotonic() + 5
    while not spans(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [s["name"] for s in spans(tmp_path)] == ["one"]
    t.close()


def test_the_default_folder_is_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    t = Telemetry("router", "r0", TraceConfig())
    t.tracer.start_span("one").end()
    t.close()
    assert len(spans(tmp_path / "home" / "traces")) == 1


def test_no_global_state(tmp_path):
    before = trace.get_tracer_provider()
    one, two = telemetry(tmp_path, "e0"), telemetry(tmp_path, "e1")
    one.tracer.start_span("a").end()
    two.tracer.start_span("b").end()
    one.close()
    two.close()
    assert trace.get_tracer_provider() is before
    assert {s["name"]: s["resource"]["attributes"]["service.instance.id"] for s in spans(tmp_path)} == {
        "a": "e0",
        "b": "e1",
    }


def test_context_travels_in_metadata(tmp_path):
    t = telemetry(tmp_path)
    parent = t.tracer.start_span("a")
    metadata = inject(parent)
    assert metadata is not None and [key for key, _ in metadata] == ["traceparent"]
    context = extract((("user-agent", "x"), *metadata, ("blob-bin", b"\0")))
    child = t.tracer.start_span("b", context=context)
    assert child.get_span_context().trace_id == parent.get_span_context().trace_id
    child.end()
    parent.end()
    t.close()
    b, a = spans(tmp_path)
    assert b["parent_id"] == a["context"]["span_id"]


def test_a_tracestate_is_passed_on(tmp_path):
    t = telemetry(tmp_path)
    given = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("tracestate", "vendor=1"))
    span = t.tracer.start_span("a", context=extract(given))
    passed = dict(inject(span) or ())
    assert passed["tracestate"] == "vendor=1" and passed["traceparent"].startswith(f"00-{'a' * 32}-")
    t.close()


@pytest.mark.parametrize("metadata", [None, (), (("x", "y"),), (("traceparent", "junk"),), (("traceparent", b"00"),)])
def test_no_context(metadata):
    assert extract(metadata) is None


def test_all_zero_ids_are_no_context():
    assert extract((("traceparent", f"00-{'0' * 32}-{'0' * 16}-01"),)) is None


def test_a_ratio_of_0_does_nothing(tmp_path):
    t = telemetry(tmp_path, trace_ratio=0.0, otlp_endpoint="http://127.0.0.1:1")
    span = t.tracer.start_span("a", attributes={"x": 1})
    assert not span.is_recording() and inject(span) is None
    fail(span, ValueError("x"))
    record_span(t.tracer, "b", span, now_ns(), now_ns())
    span.end()
    t.close()
    assert not list(tmp_path.iterdir())


def test_the_root_decides_for_the_whole_trace(tmp_path):
    router, engine = telemetry(tmp_path, "r", trace_ratio=0.5), telemetry(tmp_path, "e", trace_ratio=0.5)
    sampled = 0
    for _ in range(200):
        root = router.tracer.start_span("root")
        child = engine.tracer.start_span("child", context=extract(inject(root)))
        assert child.is_recording() == root.is_recording()
        sampled += root.is_recording()
        child.end()
        root.end()
    router.close()
    engine.close()
    assert 60 < sampled < 140
    assert len(spans(tmp_path)) == 2 * sampled


def failed_span(folder: Path, error: BaseException) -> dict[str, Any]:
    t = telemetry(folder)
    span = t.tracer.start_span("a")
    fail(span, error)
    span.end()
    # Nothing more to say about a span that has ended, and no warning either.
    fail(span, error)
    t.close()
    return spans(folder)[0]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DeadlineExceeded("too late"), "DEADLINE_EXCEEDED", "too late"),
        (ValueError("a bug"), "ValueError", "a bug"),
        (KeyError(), "KeyError", "KeyError"),
    ],
)
def test_a_failure_is_told(tmp_path, error, kind, text):
    span = failed_span(tmp_path, error)
    assert span["status"] == {"status_code": "ERROR", "description": text}
    assert span["attributes"] == {"error.type": kind}


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), Cancelled("cancelled")])
def test_a_cancel_is_marked(tmp_path, error):
    span = failed_span(tmp_path, error)
    assert span["status"] == {"status_code": "ERROR", "description": "cancelled"}
    assert span["attributes"] == {"kvmesh.cancelled": True, "error.type": "CANCELLED"}


def test_what_is_over_can_be_recorded(tmp_path):
    t = telemetry(tmp_path)
    root = t.tracer.start_span("root")
    start = now_ns() - 2_000_000_000
    queued = record_span(t.tracer, "queue", root, start, start + 1_000_000_000, {"kvmesh.tokens": 5})
    record_span(t.tracer, "inner", queued, start, start)
    record_span(t.tracer, "remote", extract(inject(root)), start, start - 5)
    record_span(t.tracer, "alone", None, start, start)
    root.end()
    t.close()
    found = {s["name"]: FileSpan.parse(json.dumps(s).encode()) for s in spans(tmp_path)}
    assert all(s is not None for s in found.values())
    by_name: dict[str, Any] = found
    assert by_name["queue"].end - by_name["queue"].start == pytest.approx(1000, abs=0.01)
    assert by_name["queue"].attributes == {"kvmesh.tokens": 5}
    assert by_name["inner"].parent_id == by_name["queue"].span_id
    assert by_name["queue"].parent_id == by_name["remote"].parent_id == by_name["root"].span_id
    # Clocks of two processes may disagree; a span never ends before it begins.
    assert by_name["remote"].end == by_name["remote"].start
    assert by_name["alone"].parent_id == ""


def made(count: int) -> list[Any]:
    """`count` ended spans of about 600 bytes each."""
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("t")
    ended: list[Span] = [tracer.start_span(f"s{i}") for i in range(count)]
    for span in ended:
        span.end()
    return ended


def test_files_rotate_and_the_oldest_go(tmp_path):
    file = SpanFile(tmp_path / "e0.jsonl", file_bytes=5000, files=3)
    for span in made(100):
        file.export([span])
    file.shutdown()
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(sizes) == {"e0.jsonl", "e0.jsonl.1", "e0.jsonl.2"} and max(sizes.values()) <= 5000
    names = [s["name"] for s in spans(tmp_path)]
    newest = [json.loads(line)["name"] for line in (tmp_path / "e0.jsonl").read_text().splitlines()]
    assert newest[-1] == "s99" and len(names) == len(set(names)) and "s0" not in names
    assert min(int(n[1:]) for n in names) == 100 - len(names)


def test_a_restart_appends(tmp_path):
    for span in made(2):
        file = SpanFile(tmp_path / "e0.jsonl")
        file.export([span])
        file.shutdown()
    assert [s["name"] for s in spans(tmp_path)] == ["s0", "s1"]


def test_a_file_that_cannot_be_written_is_logged_once_and_tried_again(tmp_path, caplog):
    place = tmp_path / "traces"
    place.write_text("not a folder")
    file = SpanFile(place / "e0.jsonl")
    for span in made(3):
        file.export([span])
    assert len(caplog.records) == 1 and "spans are not written to" in caplog.text
    place.unlink()
    file.export(made(1))
    file.shutdown()
    assert len(spans(place)) == 1


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.received: queue.Queue[Any] = queue.Queue()

    def Export(self, request: Any, context: Any) -> Any:
        for resource_spans in request.resource_spans:
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    self.received.put((resource_spans.resource, span))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    service = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_collector_gets_the_spans_too(tmp_path, collector):
    service, endpoint = collector
    t = telemetry(tmp_path, otlp_endpoint=endpoint)
    parent = t.tracer.start_span("request", attributes={"kvmesh.request_id": "r1"})
    record_span(t.tracer, "queue", parent, now_ns(), now_ns())
    parent.end()
    t.close()
    got = {span.name: (resource, span) for resource, span in (service.received.get(timeout=5) for _ in range(2))}
    resource, queued = got["queue"]
    assert queued.parent_span_id == got["request"][1].span_id and queued.trace_id == got["request"][1].trace_id
    values = {a.key: a.value.string_value for a in resource.attributes}
    assert values["service.name"] == "kvmesh.engine" and values["service.instance.id"] == "e0"
    assert len(spans(tmp_path)) == 2


def test_a_collector_that_never_answers_does_not_hold_up_the_end(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "opentelemetry")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        t = telemetry(tmp_path, otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        for i in range(3000):
            t.tracer.start_span(f"s{i}").end()
        began = time.monotonic()
        t.close()
        assert time.monotonic() - began < 2.5
        assert not [thread for thread in threading.enumerate() if "Otel" in thread.name or "telemetry" in thread.name]
        # The file has them all the same.
        assert len(spans(tmp_path)) == 3000


def test_a_span_costs_little(tmp_path):
    off, on = telemetry(tmp_path, trace_ratio=0.0), telemetry(tmp_path)

    def cost(t: Telemetry) -> float:
        best = 1.0
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(200):
                span = t.tracer.start_span("a", context=None)
                inject(span)
                span.end()
            best = min(best, (time.perf_counter() - began) / 200)
        return best

    assert cost(off) < 30e-6
    assert cost(on) < 1e-3
    on.close()
