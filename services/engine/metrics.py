"""What an engine tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvmesh.metrics import collect_with
from services.engine.status import Status

_SLOTS = ("free", "cached", "running", "reserved", "quarantined")
_GAUGES = {
    "running_requests": "Requests being prefilled or decoded.",
    "waiting_requests": "Requests not begun.",
    "waiting_reservations": "PrepRecv calls that wait for slots.",
    "waiting_tokens": "Prompt tokens yet to be prefilled.",
    "tickets": "Tickets held.",
    "sending": "RemoteSend calls under way.",
}


class Totals:
    """Sums since the start; only the event loop adds to them."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], int] = {}
        self.generated_tokens = 0
        self.sent_tokens = 0
        self.sent_bytes = 0

    def call(self, name: str, status: str) -> None:
        """A sub-request ended."""
        self.calls[name, status] = self.calls.get((name, status), 0) + 1


def register(registry: CollectorRegistry, status: Status, totals: Totals) -> None:
    """Adds the engine's metrics to `registry`."""

    def collect() -> Iterable[Metric]:
        load = status.load()
        slots = GaugeMetricFamily("kvmesh_engine_kv_slots", "KV slots by use, in tokens.", labels=["state"])
        for state in _SLOTS:
            slots.add_metric([state], getattr(load, f"{state}_slots"))
        yield slots
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"kvmesh_engine_{name}", text, getattr(load, name))
        calls = CounterMetricFamily("kvmesh_engine_calls", "Sub-requests that ended.", labels=["call", "status"])
        for (name, ended), count in list(totals.calls.items()):
            calls.add_metric([name, ended], count)
        yield calls
        yield CounterMetricFamily("kvmesh_engine_generated_tokens", "Tokens generated.", totals.generated_tokens)
        yield CounterMetricFamily("kvmesh_engine_kv_sent_tokens", "Tokens whose KV was sent.", totals.sent_tokens)
        yield CounterMetricFamily("kvmesh_engine_kv_sent_bytes", "KV bytes sent.", totals.sent_bytes)

    collect_with(registry, collect)
