"""The standard gRPC health service.

Not that of grpcio-health-checking: there, the first of several watchers of a service that leaves makes the others deaf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.errors import NotFound
from kvmesh.grpcx import rpc


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1.Health: one status for all of `services`; NOT_SERVING at first, and again from `close` on."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = frozenset(services)
        self._serving = self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Tells every watcher; nothing after `close`."""
        if not self._closed:
            self._serving = serving
            self._wake()

    def close(self) -> None:
        """NOT_SERVING for good; watches end."""
        self._serving, self._closed = False, True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _answer(self, service: str) -> Any:
        kinds = health_pb2.HealthCheckResponse
        if service not in self._services:
            return kinds(status=kinds.SERVICE_UNKNOWN)
        return kinds(status=kinds.SERVING if self._serving else kinds.NOT_SERVING)

    @rpc
    async def Check(self, request: Any, context: Any) -> Any:
        """The status now. Raises NotFound for an unknown service."""
        if request.service not in self._services:
            raise NotFound(f"service = {request.service!r} is not here")
        return self._answer(request.service)

    @rpc
    async def Watch(self, request: Any, context: Any) -> None:
        """The status now, and every change of it."""
        last = None
        while True:
            changed, answer = self._changed, self._answer(request.service)
            if answer != last:
                await context.write(answer)
                last = answer
            if self._closed:
                return
            await changed.wait()
