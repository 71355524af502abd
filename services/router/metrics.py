"""What the router tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from kvmesh.metrics import collect_with
from services.router.door import Door
from services.router.recent import Record
from services.router.view import MeshView

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5)


class RouterMetrics:
    """Observes every request that ends. Labels are bounded: names of strategies that exist, and gRPC statuses."""

    def __init__(self, registry: CollectorRegistry, door: Door, view: MeshView) -> None:
        labels = ["strategy"]
        self._requests = Counter(
            "kvmesh_router_requests", "Requests that ended.", ["strategy", "status"], registry=registry
        )
        self._attempts = Counter("kvmesh_router_attempts", "Runs of strategies.", labels, registry=registry)
        self._tokens = Counter("kvmesh_router_tokens", "Tokens.", ["strategy", "kind"], registry=registry)
        self._moved = Counter("kvmesh_router_kv_sent_bytes", "KV bytes moved for requests.", labels, registry=registry)
        self._ttft = Histogram(
            "kvmesh_router_ttft_seconds", "Time to first token.", labels, buckets=_SECONDS, registry=registry
        )
        self._tpot = Histogram(
            "kvmesh_router_tpot_seconds", "Time per token after it.", labels, buckets=_TOKEN_SECONDS, registry=registry
        )
        self._jct = Histogram(
            "kvmesh_router_jct_seconds", "Time to completion.", labels, buckets=_SECONDS, registry=registry
        )
        self._door, self._view = door, view
        collect_with(registry, self._collect)
        door.on_end = self.ended

    def ended(self, record: Record) -> None:
        """One request is over."""
        strategy = record.strategy
        self._requests.labels(strategy, record.status).inc()
        if not strategy:
            return
        self._attempts.labels(strategy).inc(record.attempts)
        self._tokens.labels(strategy, "prompt").inc(record.prompt_tokens)
        self._tokens.labels(strategy, "cached").inc(record.cached_tokens)
        self._tokens.labels(strategy, "generated").inc(record.completion_tokens)
        self._moved.labels(strategy).inc(record.sent_bytes)
        if record.ttft:
            self._ttft.labels(strategy).observe(record.ttft)
        if record.status == "done":
            self._jct.labels(strategy).observe(record.jct)
            if record.tpot:
                self._tpot.labels(strategy).observe(record.tpot)

    def _collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("kvmesh_router_running_requests", "Requests under way.", self._door.running)
        engines = GaugeMetricFamily("kvmesh_router_engines", "Engines that are registered.", labels=["state"])
        up = self._view.connected
        engines.add_metric(["up"], up)
        engines.add_metric(["down"], len(self._view.links) - up)
        yield engines
