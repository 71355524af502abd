"""Prometheus metrics of one service instance, and the page that they are scraped from.

Each service keeps a registry of its own; prometheus_client's global one is not used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvmesh import __version__
from kvmesh.aio import Tasks
from kvmesh.config import ServiceConfig
from kvmesh.errors import Unavailable
from kvmesh.grpcx import announce, join_address, split_address

log = logging.getLogger(__name__)


class _Called(Collector):
    """Metrics that are made when they are asked for."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


@asynccontextmanager
async def page(service: str, instance: str, config: ServiceConfig) -> AsyncIterator[CollectorRegistry]:
    """A registry, and its page if `config` asks for one; the address goes to the log and to `announce`.metrics."""
    registry = new_registry(service, instance)
    if not config.metrics:
        yield registry
        return
    async with serving(config.metrics, registry, config) as address:
        log.info("metrics on %s://%s/metrics", "https" if config.tls_ca else "http", address)
        if config.announce:
            announce(f"{config.announce}.metrics", address)
        yield registry


def new_registry(service: str, instance: str) -> CollectorRegistry:
    """A registry with kvmesh_build_info{service, instance, version} in it."""
    registry = CollectorRegistry(auto_describe=False)
    info = Gauge("kvmesh_build_info", "Which service this is.", ["service", "instance", "version"], registry=registry)
    info.labels(service, instance, __version__).set(1)
    return registry


def collect_with(registry: CollectorRegistry, collect: Callable[[], Iterable[Metric]]) -> None:
    """Adds metrics that `collect` makes at each scrape, in the scraping thread: it must only read."""
    registry.register(_Called(collect))


@asynccontextmanager
async def serving(listen: str, registry: CollectorRegistry, config: ServiceConfig | None = None) -> AsyncIterator[str]:
    """Serves /metrics on `listen`, in a thread; its address. Raises Unavailable when it cannot be bound.

    With TLS in `config` only for those who show a certificate of the CA.
    """
    host, port = split_address(listen)
    tls: dict[str, Any] = {}
    if config is not None and config.tls_ca:
        files = {"certfile": config.tls_cert, "keyfile": config.tls_key, "client_cafile": config.tls_ca}
        tls = {**files, "client_auth_required": True}
    try:
        server, thread = start_http_server(port, host, registry, **tls)
    except OSError as error:
        raise Unavailable(f"cannot listen on {listen} for metrics: {error.strerror}") from error
    keeping = Tasks()
    if tls:
        from kvmesh.renewal import keep

        keeping.start(keep(lambda: server.socket.context, tls["certfile"], tls["keyfile"]), "renew certificates")  # type: ignore[attr-defined]
    try:
        yield join_address(host, _port(server))
    finally:
        await keeping.close()
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join, 1.0)


def _port(server: Any) -> int:
    return int(server.server_address[1])
