"""An OTLP collector: takes spans over gRPC, and keeps them by trace."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class CollectedSpan:
    """One span as it came; nanoseconds since the epoch."""

    service: str
    instance: str
    name: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: dict[str, int]


class Collector(TraceServiceServicer):  # type: ignore[misc]
    """Runs on threads of its own: it outlives the event loops of tests."""

    def __init__(self) -> None:
        self._spans: dict[str, list[CollectedSpan]] = defaultdict(list)
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        """Takes spans."""
        with self._changed:
            for resource in request.resource_spans:
                identity = _attributes(resource.resource.attributes)
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._spans[span.trace_id.hex()].append(_collected(identity, span))
            self._changed.notify_all()
        return pb.ExportTraceServiceResponse()

    def wait(
        self, trace_id: str, complete: Callable[[list[CollectedSpan]], bool], timeout: float
    ) -> list[CollectedSpan]:
        """The spans of a trace, by start, once they are `complete`, or when the time is up."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not complete(self._spans[trace_id]) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return sorted(self._spans[trace_id], key=lambda s: s.start)

    def find(self, key: str, value: Any, timeout: float) -> str:
        """The trace of a span with that attribute; fails when none comes in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for trace_id, spans in self._spans.items():
                    if any(span.attributes.get(key) == value for span in spans):
                        return trace_id
                left = deadline - time.monotonic()
                assert left > 0, f"no span with {key} = {value!r} came within {timeout:g} s"
                self._changed.wait(left)

    def close(self) -> None:
        """Stops serving."""
        self._server.stop(0.5).wait()


def _collected(identity: dict[str, Any], span: Any) -> CollectedSpan:
    return CollectedSpan(
        service=identity["service.name"],
        instance=identity["service.instance.id"],
        name=span.name,
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events={e.name: e.time_unix_nano for e in span.events},
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
