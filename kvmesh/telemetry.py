"""Tracing of one service instance: a tracer, where its spans go, and trace context in gRPC metadata."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NoOpTracer, Span, Status, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from kvmesh import __version__
from kvmesh.config import ServiceConfig, TraceConfig, home
from kvmesh.errors import Cancelled, MeshError
from kvmesh.spanfile import SpanFile

if TYPE_CHECKING:
    import grpc

# How long a span waits for company on its way to the file, and to the collector.
FILE_DELAY_S, OTLP_DELAY_S = 0.3, 1.0
# One export to a collector that does not answer; what `close` waits for all, and then for the end of its thread.
OTLP_TIMEOUT_S, CLOSE_S, END_S = 1.5, 1.5, 0.5
_PARENT, _STATE = "traceparent", "tracestate"
_PROPAGATOR = TraceContextTextMapPropagator()


class Telemetry:
    """The tracer of one instance of a service. A `trace_ratio` of 0 makes it one that does nothing.

    Spans go to `trace_dir`/`instance`.jsonl, and to the OTLP endpoint if there is one.
    """

    def __init__(self, service: str, instance: str, config: TraceConfig) -> None:
        self._provider: TracerProvider | None = None
        self._exporters: list[SpanExporter] = []
        self.tracer: Tracer = NoOpTracer()
        if config.trace_ratio <= 0:
            return
        identity = {
            "service.name": f"kvmesh.{service}",
            "service.instance.id": instance,
            "service.version": __version__,
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.trace_ratio)),
            resource=Resource.create(identity),
            shutdown_on_exit=False,
        )
        folder = Path(config.trace_dir) if config.trace_dir else home() / "traces"
        self._export(SpanFile(folder.absolute() / f"{instance}.jsonl"), FILE_DELAY_S)
        if config.otlp_endpoint:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            self._export(
                OTLPSpanExporter(config.otlp_endpoint, timeout=OTLP_TIMEOUT_S, credentials=_otlp_credentials(config)),
                OTLP_DELAY_S,
            )
        self.tracer = self._provider.get_tracer("kvmesh", __version__)

    def _export(self, exporter: SpanExporter, delay_s: float) -> None:
        assert self._provider is not None
        self._exporters.append(exporter)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=8192, schedule_delay_millis=1000 * delay_s)
        )

    def close(self) -> None:
        """Sends off the spans that have ended, the file's first; within 2 s. May be called twice."""
        provider, self._provider = self._provider, None
        if provider is None:
            return
        thread = threading.Thread(target=provider.shutdown, name="telemetry-close", daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        if thread.is_alive():
            # A collector that is away must not hold up the end of the process: this fails what is on its way to it.
            for exporter in self._exporters:
                exporter.shutdown()
            thread.join(END_S)


def _otlp_credentials(config: TraceConfig) -> grpc.ChannelCredentials | None:
    """The service's own for an https endpoint, unless OpenTelemetry's variables name others."""
    if not isinstance(config, ServiceConfig) or not config.otlp_endpoint.startswith("https:"):
        return None
    if any(name.startswith("OTEL_EXPORTER_OTLP_") and name.endswith("CERTIFICATE") for name in os.environ):
        return None
    tls = config.tls()
    return None if tls is None else tls.channel_credentials()


def inject(span: Span) -> tuple[tuple[str, str], ...] | None:
    """gRPC metadata that makes `span` the parent on the other side; None when there is nothing to pass on."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    parent = (_PARENT, f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}")
    return (parent, (_STATE, context.trace_state.to_header())) if context.trace_state else (parent,)


def extract(metadata: Iterable[tuple[str, Any]] | None) -> Context | None:
    """The caller's trace context out of gRPC metadata; None when it sent none that is valid."""
    carrier = {key: value for key, value in metadata or () if key in (_PARENT, _STATE) and isinstance(value, str)}
    if _PARENT not in carrier:
        return None
    context = _PROPAGATOR.extract(carrier, Context())
    return context if get_current_span(context).get_span_context().is_valid else None


def fail(span: Span, error: BaseException) -> None:
    """Marks `span` as failed by `error`; one that was cancelled gets kvmesh.cancelled. Does not end it."""
    if not span.is_recording():
        return
    if isinstance(error, asyncio.CancelledError | GeneratorExit | Cancelled):
        span.set_attribute("kvmesh.cancelled", True)
        kind, text = Cancelled.status, str(error) or "cancelled"
    else:
        kind = error.status if isinstance(error, MeshError) else type(error).__name__
        text = str(error) or kind
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, text))


def now_ns() -> int:
    """Nanoseconds since the epoch: the time that spans are in."""
    return time.time_ns()


def record_span(
    tracer: Tracer,
    name: str,
    parent: Span | Context | None,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, Any] | None = None,
) -> Span:
    """A span of something that is over already, from `start_ns` to `end_ns` (now_ns); ended, fit to be a parent."""
    context = set_span_in_context(parent, Context()) if isinstance(parent, Span) else parent
    given: Attributes = dict(attributes) if attributes else None
    span = tracer.start_span(name, context=context, start_time=start_ns, attributes=given)
    span.end(max(start_ns, end_ns))
    return span
