"""A registry that serves: backend, service and gRPC server, started and stopped in the right order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvmesh.grpcx import Server
from kvmesh.guard import Access
from kvmesh.v1.registry_pb2_grpc import add_RegistryServicer_to_server
from services.registry.base import Backend
from services.registry.service import NAME, RegistryService


@asynccontextmanager
async def serving(backend: Backend, listen: str, access: Access | None = None) -> AsyncIterator[Server]:
    """Serves `backend`, and closes it at the end. Raises Unavailable when `listen` cannot be bound."""
    try:
        service = RegistryService(backend)
        server = Server(listen, lambda s: add_RegistryServicer_to_server(service, s), [NAME], access)
        try:
            await backend.start()
            await server.start()
            yield server
        finally:
            # Watches never finish by themselves: the server's grace is for the other calls.
            backend.end_watches()
            await server.stop()
    finally:
        await backend.close()
