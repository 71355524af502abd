"""Finding one request's spans in what the services wrote."""

import json
import os
import threading
import time

import pytest
from opentelemetry.trace import set_span_in_context

from kvmesh.config import TraceConfig
from kvmesh.local.spans import Span, find_trace, settled_trace, span_files, trace_folders
from kvmesh.local.state import MeshDir
from kvmesh.telemetry import Telemetry


def write(folder, request_id: str, instances=("router-1", "engine-0")) -> str:
    """Spans of one request from two instances, as services write them; returns the trace id."""
    parent = None
    trace_id = ""
    for instance in instances:
        telemetry = Telemetry(instance.split("-")[0], instance, TraceConfig(trace_dir=str(folder)))
        context = set_span_in_context(parent) if parent else None
        attributes = {"kvmesh.request_id": request_id, "kvmesh.sent_bytes": 10} if parent is None else {}
        span = telemetry.tracer.start_span(f"of {instance}", context=context, attributes=attributes)
        trace_id = f"{span.get_span_context().trace_id:032x}"
        span.add_event("first_token", {"kvmesh.n": 1})
        span.end()
        telemetry.close()
        parent = parent or span
    return trace_id


def test_spans_of_all_instances_are_found_with_parents_and_times(tmp_path):
    begun = time.time() * 1000
    trace_id = write(tmp_path, "r-1")
    write(tmp_path, "r-2")
    root, child = find_trace("r-1", [tmp_path])
    assert (root.name, root.instance, root.parent_id) == ("of router-1", "router-1", "")
    assert (child.name, child.instance, child.parent_id) == ("of engine-0", "engine-0", root.span_id)
    assert root.trace_id == child.trace_id == trace_id
    assert begun - 1 <= root.start <= root.end <= child.end <= time.time() * 1000 + 1
    assert root.attributes["kvmesh.sent_bytes"] == 10 and root.error == ""
    ((at, name, attributes),) = root.events
    assert root.start <= at <= root.end and (name, attributes) == ("first_token", {"kvmesh.n": 1})


def test_of_a_request_id_used_twice_the_newest_is_found(tmp_path):
    write(tmp_path, "r")
    second = write(tmp_path, "r")
    assert {s.trace_id for s in find_trace("r", [tmp_path])} == {second}


def test_an_id_that_is_part_of_another_or_of_other_text_is_not_found(tmp_path):
    write(tmp_path, "r-123")
    assert find_trace("r-12", [tmp_path]) == [] and find_trace("of router-1", [tmp_path]) == []
    assert find_trace("", [tmp_path]) == [] and find_trace('"', [tmp_path]) == []


def test_ids_that_json_escapes_are_found(tmp_path):
    write(tmp_path, 'a"b\\ü')
    assert len(find_trace('a"b\\ü', [tmp_path])) == 2


def test_lines_that_are_cut_or_something_else_are_passed_over(tmp_path):
    write(tmp_path, "r-1")
    (path,) = tmp_path.glob("router-1.jsonl")
    whole = path.read_bytes()
    broken = [whole[:100], b"", b"r-1", b'"r-1"', b'{"context": "r-1"}', b'{"r-1": 1}', b"\xff r-1"]
    path.write_bytes(b"\n".join([*broken, whole.rstrip(b"\n"), whole[:200]]))
    assert [s.name for s in find_trace("r-1", [tmp_path])] == ["of router-1", "of engine-0"]


def test_rotated_files_are_read_and_folders_that_are_not_there_are_none(tmp_path):
    write(tmp_path, "r-1")
    os.replace(tmp_path / "router-1.jsonl", tmp_path / "router-1.jsonl.2")
    (tmp_path / "other.txt").write_text("r-1")
    assert len(find_trace("r-1", [tmp_path / "gone", tmp_path])) == 2
    assert {p.name for p in span_files([tmp_path])} == {"router-1.jsonl.2", "engine-0.jsonl"}


def test_an_error_keeps_its_text():
    raw = {
        "name": "x",
        "context": {"trace_id": "0x1", "span_id": "0x2"},
        "parent_id": None,
        "start_time": "2026-11-21T10:00:00.000000Z",
        "end_time": "2026-11-21T10:00:00.250000Z",
        "status": {"status_code": "ERROR", "description": "no room"},
        "attributes": {},
        "resource": {"attributes": {"service.instance.id": "engine-0"}},
    }
    span = Span.parse(json.dumps(raw).encode())
    assert span is not None and span.error == "no room" and span.end - span.start == 250.0
    raw["status"] = {"status_code": "ERROR"}
    assert Span.parse(json.dumps(raw).encode()).error == "failed"
    raw["start_time"] = "yesterday"
    assert Span.parse(json.dumps(raw).encode()) is None


def test_it_waits_for_spans_that_come_a_little_later(tmp_path):
    later = threading.Timer(0.3, write, (tmp_path, "r-1"))
    later.start()
    begun = time.monotonic()
    assert len(settled_trace("r-1", [tmp_path], patience=10, settle=0.2)) == 2
    assert 0.3 <= time.monotonic() - begun < 5
    later.join()


def test_it_does_not_wait_longer_than_it_may(tmp_path):
    begun = time.monotonic()
    assert settled_trace("r-1", [tmp_path], patience=0.3) == []
    assert 0.25 <= time.monotonic() - begun < 2


def test_every_mesh_is_looked_through(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path))
    MeshDir("m").root.mkdir(parents=True)
    assert trace_folders() == [tmp_path / "traces", tmp_path / "run" / "m" / "traces"]
    write(MeshDir("m").traces, "r-1")
    assert len(find_trace("r-1", trace_folders())) == 2


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"3", b"null", b'{"name": 1}', b"{" * 50])
def test_what_is_no_span_is_none(line):
    assert Span.parse(line) is None
