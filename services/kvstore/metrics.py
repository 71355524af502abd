"""What a KV store tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvmesh.metrics import collect_with
from services.kvstore.status import Status

_GAUGES = {
    "unwritten": "Blocks still to be written to disk.",
    "disk_used_bytes": "Bytes of disk that blocks take.",
    "pinned": "Blocks pinned.",
    "locked": "Blocks in use by sends and tickets.",
    "tickets": "Tickets held.",
    "sending": "RemoteSend calls under way.",
    "waiting": "Calls that wait for memory.",
}
_COUNTERS = {
    "asked_tokens": "Tokens that RemoteSend calls asked for.",
    "sent_tokens": "Tokens that they were given.",
    "stored_blocks": "Blocks received.",
    "loaded_blocks": "Blocks read from disk.",
    "written_blocks": "Blocks written to disk.",
    "evicted_blocks": "Blocks gone for want of room.",
    "expired_blocks": "Blocks gone because their time was over.",
    "damaged_blocks": "Files of blocks that were damaged.",
    "disk_errors": "Failures of the disk.",
}


def register(registry: CollectorRegistry, status: Status) -> None:
    """Adds the store's metrics to `registry`."""

    def collect() -> Iterable[Metric]:
        stats = status.stats()
        blocks = GaugeMetricFamily("kvmesh_kvstore_blocks", "Blocks by place.", labels=["place"])
        for place in ("memory_free", "memory_used", "memory_reserved", "disk_blocks"):
            blocks.add_metric([place.removesuffix("_blocks")], getattr(stats, place))
        yield blocks
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"kvmesh_kvstore_{name}", text, getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"kvmesh_kvstore_{name}", text, getattr(stats, name))

    collect_with(registry, collect)
